"""-log sigmoid(x) for Triton kernels of losses over pairs of responses."""

import triton
from triton import language as tl


@triton.jit
def minus_log_sigmoid(x):  # type: ignore[no-untyped-def]
    """max(-x, 0) + log(1 + e^-|x|). It is finite for every finite x, and has a small relative error.

    1 + e rounds e. The product log(1 + e) x e / ((1 + e) - 1) corrects the rounding (Goldberg 1991, theorem
    4).
    """
    e = tl.exp(-tl.abs(x))
    one_more = 1.0 + e
    rounded = one_more - 1.0
    exact = tl.log(one_more) * (e / tl.where(rounded == 0.0, 1.0, rounded))
    return tl.maximum(-x, 0.0) + tl.where(rounded == 0.0, e, exact)
