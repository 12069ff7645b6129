"""Layer specifications: Transformer Engine's, the portable ones, and a mixture of both.

A GPU with Transformer Engine uses its layers, and other machines use the portable layers. The mixture has
Transformer Engine's layers with the portable attention. Only this module imports Transformer Engine, and only
inside functions.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_post.config.schema import Config
from megatron_post.models.attention import PackedAttention

# All kinds of layers use the same names in checkpoints, so that each can resume the checkpoints of the
# others. Norms have the names that they get if Transformer Engine fuses them into linear layers.
_NAMES_OF_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_version() -> str | None:
    """The version of Transformer Engine's package. None if it is not installed."""
    try:
        return importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def user_buffers(config: Config) -> Iterator[None]:
    """Within this context Transformer Engine's layers can communicate during their multiplications.

    This implements `parallel.tp_comm_overlap`. All ranks enter the context together, after the process group
    exists. Every layer must get packs of `data.pack_length`, because a multiplication covers the whole
    buffer. Raises `ValueError` if the GPUs cannot share buffers.
    """
    p = config.parallel
    if not p.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    if not base.tex.device_supports_multicast() and os.environ.get("UB_SKIPMC") != "1":
        raise ValueError(
            "parallel.tp_comm_overlap=true needs GPUs, a driver and a CUDA with multicast; set UB_SKIPMC=1 "
            "in the environment to use CUDA IPC, or parallel.tp_comm_overlap=false"
        )
    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        [config.data.pack_length // p.context, config.model.hidden_size],
        p.tensor,
        quantization_modes=[modes.FP8 if config.precision.fp8 else modes.NONE],
        dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        bootstrap_backend=torch.distributed.get_backend(),
    )
    try:
        yield
    finally:
        base.destroy_ub()


class RMSNorm(torch.nn.Module):
    """RMS norm that is exact under sequence parallelism.

    The weight's mark `sequence_parallel` makes megatron-core sum its gradient over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] in fp32 or better. Returns x's dtype."""
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def block_spec(
    config: TransformerConfig,
    *,
    portable: bool,
    shares_prompts: bool,
    adapted: bool = False,
    virtual_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk, and the final norm.

    shares_prompts: rows have several responses to one prompt. Only the portable attention can compute this.
    adapted: linear layers have adapters.
    """
    if portable:
        layer, norm = _portable_layer(), RMSNorm
    else:
        layer, norm = _transformer_engine_layer(config, shares_prompts=shares_prompts, adapted=adapted)
    layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let layers add weight gradients directly to data parallelism's fp32 buffers.

    These are Transformer Engine's layers and the output layer. megatron-core's `gradient_accumulation_fusion`
    does the same, but also requires Apex's kernel for the output layer. That kernel is not needed, because
    this package's loss computes the output layer's gradient.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _portable_layer() -> ModuleSpec:
    """A Llama layer in plain torch, which is exact under TP, SP, CP, PP and packing on any device."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=None,
                    k_layernorm=None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_NAMES_OF_NORMS,
        ),
    )


def _transformer_engine_layer(
    config: TransformerConfig, *, shares_prompts: bool, adapted: bool
) -> tuple[ModuleSpec, Any]:
    """megatron-core's layer with Transformer Engine's parts, and the final norm.

    If rows share prompts, the layer has the portable attention. This costs no FP8 speed, because only linear
    layers use FP8. If norms are recomputed, they are modules of their own. megatron-core cannot recompute a
    norm that is fused into a linear layer, and would ignore the setting. The same holds if linear layers have
    adapters, which multiply the norm's output too.
    """
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec()
    parts = layer.submodules
    if shares_prompts:
        parts.self_attention.submodules.core_attention = PackedAttention
    recomputes_norms = config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules
    if recomputes_norms or adapted:
        parts.input_layernorm = parts.pre_mlp_layernorm = TENorm
        parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
        parts.sharded_state_dict_keys_map = _NAMES_OF_NORMS
    return layer, TENorm
