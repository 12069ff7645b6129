"""FP8 in the stand-in: weights that are kept in FP8, with one scale for each tensor.

torch converts to `float8_e4m3fn` on a CPU, so these values are rounded as on a GPU. Matrices are multiplied
outside of Transformer Engine's FP8 context, where its layers convert the weights back.
"""

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in import TORCH_DTYPE, compiled, tex

_FP8 = {tex.DType.kFloat8E4M3: torch.float8_e4m3fn, tex.DType.kFloat8E5M2: torch.float8_e5m2}


@compiled
def quantize(x: Tensor, quantizer: Any, out: Any = None, no_op: Any = None) -> Any:
    """Convert to FP8. The quantizer of current scaling takes its scale from x, others have one."""
    if type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        compute_amax(x, quantizer.amax)
        multi_tensor_compute_scale_and_scale_inv(
            0, None, [[quantizer.amax], [quantizer.scale], [torch.empty(1)]], 448.0, False, 0.0
        )
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype)
    kind = _FP8[quantizer.dtype]
    largest = torch.finfo(kind).max
    values = (x.detach().float() * quantizer.scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    out._data.copy_(values.view(out._data.shape))
    out._scale_inv.copy_(1 / quantizer.scale)
    if quantizer.columnwise_usage and out._data.dim() == 2 and out._transpose is not None:
        out._create_transpose()
    return out


@compiled
def dequantize(x: Any, dtype: Any) -> Tensor:
    values = x._data.view(_FP8[x._fp8_dtype]).float() * x._scale_inv
    return values.to(TORCH_DTYPE[dtype])


@compiled
def compute_amax(x: Tensor, amax: Tensor) -> None:
    amax.copy_(x.detach().abs().max().float().view(1))


@compiled
def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, no_op: Any, lists: Any, largest: float, powers_of_2: bool, epsilon: float
) -> None:
    assert not powers_of_2 and not epsilon
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(torch.where(amax > 0, largest / amax, torch.ones_like(amax)))
        inverse.copy_(1 / scale)


@compiled
def fp8_transpose(values: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    transposed = values.view(-1, values.shape[-1]).t()
    return transposed.contiguous() if out is None else out.copy_(transposed)
