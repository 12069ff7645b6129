"""Plain torch in place of Transformer Engine's compiled module, so that its own Python code runs on a CPU.

`install()` makes the real package of `transformer_engine` importable without its CUDA parts. Everything that
the package computes in `transformer_engine_torch` is computed here by torch: matrix products, RMSNorm, fused
rotary embeddings and the fused optimizer's functions. Attention is replaced one level higher, in
`DotProductAttention.forward`, after each keyword was bound to Transformer Engine's own signature.

What this proves: names, keywords, layouts, state keys, schedules, sequence-parallel flags and the arithmetic
in fp32. What it cannot prove: kernels, bf16 and FP8 numbers, Transformer Engine's context parallelism over
NCCL, and speed. Any function that is missing here raises `NotImplementedError` with its name.
"""

import contextlib
import enum
import functools
import importlib
import importlib.machinery
import inspect
import os
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

# `make install` puts the pure Python wheel here. It must not lie in site-packages, since megatron-core would
# import it there and would fail without the compiled module.
WHEELS = Path(sys.prefix) / "transformer_engine"

_ENUMS = {
    "DType": "kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat8E8M0 "
    "kFloat4E2M1",
    "FP8FwdTensors": "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT "
    "GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT",
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
    "CommOverlapType": "RS AG",
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_max512_seqlen NVTE_F16_arbitrary_seqlen NVTE_FP8",
    "NVTE_QKV_Layout": "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD "
    "NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD "
    "NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD "
    "NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD "
    "NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD "
    "NVTE_Paged_KV_THD_SBHD_SBHD",
    "NVTE_QKV_Format": "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD "
    "NVTE_THD_2SBHD",
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
}
_CLASSES = "CommOverlapCore FP8TensorMeta CommOverlapBase"
# Of these Transformer Engine's Python alone needs the names: it imports them when it is loaded.
_NAMES_ONLY = ("onnxscript", "onnxscript.onnx_opset", "onnx", "einops")


class _CompiledModule(types.ModuleType):
    """`transformer_engine_torch`. What this file does not define raises when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"the stand-in has no transformer_engine_torch.{name}")

        missing.__name__ = name
        return missing


tex: Any = _CompiledModule("transformer_engine_torch")
for _name, _members in _ENUMS.items():
    _start = -1 if _name == "NVTE_Fused_Attn_Backend" else 0
    setattr(tex, _name, enum.IntEnum(_name, _members.split(), start=_start))
for _name in _CLASSES.split():
    setattr(tex, _name, type(_name, (), {}))
TORCH_DTYPE = {
    tex.DType.kFloat32: torch.float32,
    tex.DType.kBFloat16: torch.bfloat16,
    tex.DType.kFloat16: torch.float16,
}


CALLS: Counter[str] = Counter()  # of each function that is replaced here, in this process


def compiled(function: Any) -> Any:
    """Register a class or function of the compiled module under its own name, and count a function's
    calls."""
    setattr(tex, function.__name__, function if isinstance(function, type) else _counted(function))
    return function


def _counted(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return call


for _name, _value in {
    "get_stream_priority_range": (0, 0),
    "get_num_cublas_streams": 1,
    "get_cublasLt_version": 130000,
    "get_cudnn_version": 91400,
    "ubuf_built_with_mpi": False,
    "device_supports_multicast": False,
    "get_fused_attn_backend": tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend,
}.items():
    setattr(tex, _name, lambda *_, value=_value: value)


@compiled
class CommOverlapHelper:
    def __init__(self, *groups: Any) -> None:
        pass


@compiled
class CommOverlap:
    """A buffer of t x h that the tensor-parallel ranks gather and scatter."""

    def __init__(self, shape: list[int], dtype: torch.dtype, helper: Any, size: int, *_: Any, **__: Any):
        self.buffer, self.size = torch.full(shape, torch.nan, dtype=dtype), size

    def is_fp8_ubuf(self) -> bool:
        return False

    def get_buffer(self, local_chunk: bool = False, shape: list[int] | None = None) -> Tensor:
        # a view, since Transformer Engine empties what it was given when it needs it no more
        buffer = self.buffer.chunk(self.size)[self.group.rank()] if local_chunk else self.buffer[:]
        return buffer if shape is None else buffer.view(shape)  # every pack fills the buffer

    def copy_into_buffer(self, values: Tensor, local_chunk: bool = False) -> None:
        self.get_buffer(local_chunk, list(values.shape)).copy_(values)

    @property
    def group(self) -> Any:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        return get_tensor_model_parallel_group()

    @_counted
    def gather(self) -> None:
        own = self.get_buffer(local_chunk=True).clone()
        torch.distributed.all_gather_into_tensor(self.buffer, own, group=self.group)

    @_counted
    def scatter(self, values: Tensor, target: Tensor) -> None:
        own = torch.empty_like(self.get_buffer(local_chunk=True))
        torch.distributed.reduce_scatter_tensor(own, values.clone().view(self.buffer.shape), group=self.group)
        target.copy_(own.view(target.shape))


@compiled
class CommOverlapP2P(CommOverlap):
    pass


@compiled
def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_input: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *_: Any,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    **__: Any,
) -> tuple[Tensor, None, None, Any]:
    """op(b) @ op(a) in torch's row-major order. cuBLAS's own order is column-major, so the operands swap.

    comm_overlap: a buffer that is gathered before, as `b` is a view of it, or scattered behind. In bulk it is
    another tensor's.
    """
    gathers = comm_overlap is not None and comm_type == tex.CommOverlapType.AG
    scatters = comm_overlap is not None and comm_type == tex.CommOverlapType.RS
    if gathers:
        comm_overlap.gather()
    elif scatters and bulk_overlap:
        comm_overlap.scatter(comm_overlap.buffer, comm_overlap.get_buffer(local_chunk=True))
    assert quantizer is None and not gelu and bias is None, "the stand-in has no FP8, GELU or bias"
    left, right = b.reshape(-1, b.shape[-1]), a.reshape(-1, a.shape[-1])
    product = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    if output_dtype is not None:
        product = product.to(TORCH_DTYPE[output_dtype])
    if not transpose_b:
        product = product.reshape(*b.shape[:-1], product.shape[-1])
    if out is not None:
        product = product.reshape(out.shape)
        out.copy_(out + product if accumulate else product)
        product = out
    if scatters and not bulk_overlap:
        comm_overlap.scatter(product, extra_output)
    return product, None, None, extra_output


@compiled
def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    assert not zero_centered
    scale = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    return (x.float() * scale[..., None] * weight.float()).to(TORCH_DTYPE[dtype]), None, scale


@compiled
def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    gradient, scale = gradient.reshape(x.shape).float(), scale.reshape(*x.shape[:-1], 1)
    normal = x.float() * scale
    weight_gradient = (gradient * normal).reshape(-1, x.shape[-1]).sum(0)
    scaled = gradient * weight.float()
    input_gradient = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * scale
    return input_gradient.to(x.dtype), weight_gradient.to(weight.dtype)


@compiled
def fused_rope_forward(
    x: Tensor, angles: Tensor, start: Any, form: Any, interleaved: bool, cu_seqlens: Any, size: int, rank: int
) -> Tensor:
    assert angles.dtype == torch.float32 and not interleaved
    if form == tex.NVTE_QKV_Format.NVTE_THD:
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        assert longest <= len(angles), f"a segment of {longest} tokens has angles for {len(angles)}"
    return _rotate(x, angles, form, cu_seqlens, size=size, rank=rank, sign=1)


@compiled
def fused_rope_backward(gradient: Tensor, angles: Tensor, *arguments: Any) -> Tensor:
    form, _, cu, size, rank = arguments[-5:]  # behind the start, which version 2.9 does not have
    return _rotate(gradient, angles, form, cu, size=size, rank=rank, sign=-1)


def _rotate(
    x: Tensor, angles: Tensor, form: Any, cu_seqlens: Tensor | None, *, size: int, rank: int, sign: int
) -> Tensor:
    """x: [t/cp, heads, d] of packed segments, in each of which positions restart and of each of which a rank
    holds two zigzag chunks; or [t/cp, 1, heads, d] with angles of its own for every token."""
    if form == tex.NVTE_QKV_Format.NVTE_THD:
        assert cu_seqlens is not None
        positions = torch.cat(
            [chunk for n in cu_seqlens.diff().tolist() for chunk in _zigzag(n, size=size, rank=rank)]
        )
        chosen = angles[positions][:, 0]  # [t/cp, 1, rotated part of d]
    else:
        assert form == tex.NVTE_QKV_Format.NVTE_SBHD and size == 1 and len(angles) == len(x)
        chosen = angles
    width = chosen.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = turned.chunk(2, -1)
    other = torch.cat((-second, first), -1)
    result = turned * chosen.cos() + sign * other * chosen.sin()
    return torch.cat((result.to(x.dtype), rest), -1)


def _zigzag(length: int, *, size: int, rank: int) -> list[Tensor]:
    """Positions of a segment that a context-parallel rank holds."""
    if size == 1:
        return [torch.arange(length)]
    chunk = length // (2 * size)
    return [torch.arange(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


@compiled
def multi_tensor_l2norm(
    chunk: int, no_op: Any, lists: Any, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([values.float().norm() for values in lists[0]])
    return norms.norm().reshape(1), norms


@compiled
def multi_tensor_scale(chunk: int, no_op: Any, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


@compiled
def multi_tensor_adam(
    chunk: int,
    no_op: Any,
    lists: Any,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: bool,
    weight_decay: float,
) -> None:
    """AdamW (mode 1), as Loshchilov and Hutter write it."""
    assert mode == 1 and bias_correction
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        gradient = gradient.float()
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        parameter.add_(update + weight_decay * parameter, alpha=-lr)


def install(version: str = "2.11.0") -> None:
    """Make `import transformer_engine.pytorch` work in this process, for good.

    megatron-core looks for Transformer Engine when it is imported, so this must come first. Raises
    `ImportError` where the wheel of this version is not there.
    """
    assert "megatron.core" not in sys.modules, "megatron-core has already decided that there is none"
    wheel = WHEELS / version
    if not wheel.is_dir():
        raise ImportError(f"{wheel} is missing; run `make install`")
    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0", "TORCHDYNAMO_DISABLE": "1"}
    sys.path.insert(0, str(wheel))
    for name in _NAMES_ONLY:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock()
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    importlib.import_module("tests.transformer_engine.stand_in_fp8")
    _define_missing(wheel)
    sys.modules["transformer_engine_torch"] = tex
    _pretend_a_gpu(capability=(9, 0))
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda _: None
    _replace_attention()
    _replace_unused_gradients()


def _define_missing(wheel: Path) -> None:
    """Every name of the compiled module that the package mentions exists, for `hasattr` and imports."""
    import re

    sources = (wheel / "transformer_engine" / "pytorch").rglob("*.py")
    names = {name for path in sources for name in re.findall(r"\btex\.([A-Za-z_0-9]+)", path.read_text())}
    for name in names - set(vars(tex)):
        setattr(tex, name, getattr(tex, name))


def _pretend_a_gpu(*, capability: tuple[int, int]) -> None:
    """What Transformer Engine asks of a device when it is imported and when its modules are made."""
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        name="stand-in",
        total_memory=80 << 30,
    )
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda _: contextlib.nullcontext()  # version 2.9 enters its parameters' device
    real = torch._C.TensorBase.is_cuda

    def is_cuda(self: Tensor) -> bool:
        """True in Transformer Engine's own assertions, and true to itself in our code."""
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        return asked_by.startswith("transformer_engine") or real.__get__(self)

    torch.Tensor.is_cuda = property(is_cuda)
    torch.Tensor.cuda = lambda self, *_, **__: self


def _replace_attention() -> None:
    from transformer_engine.pytorch import distributed, utils
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import base

    utils._empty_tensor = torch.Tensor
    # its recomputation of whole modules, which megatron-core uses with FP8, restores the generator's state
    distributed._get_cuda_rng_state = lambda *_, **__: torch.default_generator.get_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.default_generator.set_state(state)
    workspace = torch.empty(16, dtype=torch.uint8)
    gemm.get_cublas_workspace = lambda *_: workspace
    # modules assert that CUDA is there when they are made, and at no other time
    module = base.TransformerEngineBaseModule
    made = module.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            made(self, *args, **kwargs)

    module.__init__ = make
    attention = dot_product_attention.DotProductAttention
    signature = inspect.signature(attention.forward)

    def forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
    ) -> Tensor:
        signature.bind(self, query, key, value, mask, **kwargs)
        return packed_attention(query, key, value, group=self.cp_group, kind=self.cp_comm_type, **kwargs)

    attention.forward = forward


def _replace_unused_gradients() -> None:
    """Transformer Engine asks for device "cuda" there, inside a backward pass, where the CPU adapter is not
    asked."""
    from transformer_engine.pytorch.module import layernorm_linear, linear

    def unused(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
        return torch.full(shape, 0.0 if zero else torch.nan, dtype=dtype)

    linear.get_dummy_wgrad = layernorm_linear.get_dummy_wgrad = unused


@_counted
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any,
    kind: str,
    qkv_format: str,
    attn_mask_type: str,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Causal attention inside each segment. query, key, value: [t/cp, heads, d]. Returns [t/cp, heads * d].

    Without context parallelism the padded lengths must be absent: where they are there, Transformer Engine
    compares them on the host, and every layer waits for the GPU.
    """
    assert qkv_format == "thd" and attn_mask_type == "padding_causal"
    assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_q == int(cu_seqlens_q.diff().max())
    scale = query.shape[-1] ** -0.5
    size = 1 if group is None else torch.distributed.get_world_size(group)
    if size == 1:
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None
        return _attend(query, key, value, cu_seqlens_q, scale).flatten(1)
    assert cu_seqlens_q_padded is not None and cu_seqlens_kv_padded is not None
    if kind == "a2a":
        return _exchanged_attention(query, key, value, cu_seqlens_q, max_seqlen_q, group).flatten(1)
    # torch's own differentiable all-gather cannot take a group that rank 0 is not in
    from megatron_post.models.attention import gather_sequence

    starts, lengths = cu_seqlens_q[:-1].tolist(), cu_seqlens_q.diff().tolist()
    held = [
        [
            chunk + start
            for start, n in zip(starts, lengths, strict=True)
            for chunk in _zigzag(n, size=size, rank=r)
        ]
        for r in range(size)
    ]
    order = torch.cat([chunk for chunks in held for chunk in chunks]).argsort()
    whole = [gather_sequence(x.transpose(0, 1), order, group).transpose(0, 1) for x in (query, key, value)]
    output = _attend(*whole, cu_seqlens_q, scale)
    return output[torch.cat(held[torch.distributed.get_rank(group)])].flatten(1)


@_counted
def _exchanged_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, group: Any
) -> Tensor:
    """Transformer Engine's own exchange of heads for tokens, around torch's attention. [t/cp, heads, d]."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    def forward(training: bool, _q: int, _k: int, cu: Tensor, _cu: Tensor, *tensors: Any, **keys: Any) -> Any:
        return _attend(*tensors[:3], cu, keys["attn_scale"]), []

    def backward(_q: int, _k: int, cu: Tensor, _cu: Tensor, *tensors: Any, **keys: Any) -> Any:
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        with torch.enable_grad():
            output = _attend(*inputs, cu, keys["attn_scale"])
        return torch.autograd.grad(output, inputs, tensors[4])

    context_parallel.fused_attn_fwd, context_parallel.fused_attn_bwd = forward, backward
    return context_parallel.attn_forward_func_with_cp(
        True,
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        cu_seqlens,
        cu_seqlens,
        0.0,
        group,
        torch.distributed.get_process_group_ranks(group),
        torch.cuda.Stream(),
        "a2a",
        softmax_scale=query.shape[-1] ** -0.5,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        use_fused_attention=True,
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    for parts in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in parts)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
