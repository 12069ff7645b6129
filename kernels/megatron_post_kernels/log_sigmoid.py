"""-log sigmoid(x) within Triton kernels, as the losses over pairs of responses need it."""

import triton
from triton import language as tl


@triton.jit
def minus_log_sigmoid(x):  # type: ignore[no-untyped-def]
    """max(-x, 0) + log(1 + e^-|x|): never infinite before x is, and relatively exact for large x too.

    1 + e rounds e; log(1 + e) x e / ((1 + e) - 1) takes the logarithm's share of that back (Goldberg 1991,
    theorem 4).
    """
    e = tl.exp(-tl.abs(x))
    one_more = 1.0 + e
    rounded = one_more - 1.0
    exact = tl.log(one_more) * (e / tl.where(rounded == 0.0, 1.0, rounded))
    return tl.maximum(-x, 0.0) + tl.where(rounded == 0.0, e, exact)
