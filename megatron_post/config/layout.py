"""Computes from the config which parallel layouts can work, and which lengths they need."""

import math

from megatron_post.config import fp8
from megatron_post.config.sections import UncheckedConfig
from megatron_post.config.switches import switch_errors, switch_machine_errors
from megatron_post.installation import install_command


def store_layout(config: UncheckedConfig) -> str:
    """The layout of examples in the packed store that the stage's collate function expects."""
    layouts = {
        "preferences": config.reward.layout,
        "pairs": "isolated_pairs" if config.dpo.layout == "isolated" else "separate",
        "documents": f"{config.pretrain.documents}_documents",
    }
    return layouts.get(config.traits.examples, config.traits.examples)


def segment_multiple(config: UncheckedConfig) -> int:
    """The multiple to which each segment of a pack is padded.

    The zigzag split of context parallelism cuts every segment into 2 x CP equal chunks. Documents that see
    each other have no padding between them, because their pack is cut as a whole.
    """
    return 1 if config.joins_documents else _context_multiple(config)


def _context_multiple(config: UncheckedConfig) -> int:
    return 2 * config.parallel.context if config.parallel.context > 1 else 1


def pack_multiple(config: UncheckedConfig) -> int:
    """The number that must divide `data.pack_length`.

    It comes from 2 x CP, from TP with sequence parallelism, and from FP8's rows of a rank's shard. A matrix
    multiplication gets a whole pack, so TP and FP8 restrict the pack's length and not that of its segments.
    """
    p = config.parallel
    shards = p.context * (p.tensor if p.sequence else 1)
    return math.lcm(_context_multiple(config), shards * fp8.multiple_of(config.precision.fp8))


def microbatch_multiple(config: UncheckedConfig) -> int:
    """The number that must divide a rank's microbatches. The interleaved schedule runs them in groups."""
    return config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1


def layout_errors(config: UncheckedConfig) -> list[str]:
    """Every reason why the layout cannot work on any number of ranks. Empty if it can."""
    m, p = config.model, config.parallel
    checks = [
        (
            m.hidden_size % m.num_attention_heads == 0,
            f"model.hidden_size={m.hidden_size} is not a multiple of "
            f"num_attention_heads={m.num_attention_heads}",
        ),
        (
            m.hidden_size % m.num_attention_heads != 0 or m.head_dim % 2 == 0,
            f"model.hidden_size={m.hidden_size} over num_attention_heads={m.num_attention_heads} gives heads "
            f"of {m.head_dim}, and rotary embeddings need an even number; change one of them",
        ),
        (
            m.num_attention_heads % m.num_key_value_heads == 0,
            f"model.num_attention_heads={m.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={m.num_key_value_heads}",
        ),
        (
            m.num_attention_heads % p.tensor == 0,
            f"model.num_attention_heads={m.num_attention_heads} is not a multiple of "
            f"parallel.tensor={p.tensor}",
        ),
        (
            m.num_key_value_heads % p.tensor == 0,
            f"model.num_key_value_heads={m.num_key_value_heads} is not a multiple of "
            f"parallel.tensor={p.tensor}; lower parallel.tensor",
        ),
        (
            m.ffn_hidden_size % p.tensor == 0,
            f"model.ffn_hidden_size={m.ffn_hidden_size} is not a multiple of parallel.tensor={p.tensor}",
        ),
        (
            not p.sequence or p.tensor > 1,
            "parallel.sequence=true needs parallel.tensor > 1; set parallel.sequence=false",
        ),
        (
            p.virtual_pipeline == 1 or p.pipeline > 1,
            f"parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline > 1",
        ),
        (
            config.data.pack_length % pack_multiple(config) == 0,
            f"data.pack_length={config.data.pack_length} is not a multiple of {pack_multiple(config)}, which "
            f"context={p.context}, tensor={p.tensor}, sequence={p.sequence}, fp8={config.precision.fp8} need",
        ),
    ]
    found = [message for ok, message in checks if not ok]
    return found + fp8.setting_errors(config) + _pipeline_errors(config) + switch_errors(config)


def _pipeline_errors(config: UncheckedConfig) -> list[str]:
    p, layers = config.parallel, config.model.num_layers
    chunks = p.pipeline * p.virtual_pipeline
    if (layers + 2 * p.embedding_and_loss_as_layers) % chunks == 0:
        return []
    fits = (layers + 2) % chunks == 0 and p.pipeline > 1
    hint = " (with embedding_and_loss_as_layers=true it would fit)" if fits else ""
    return [
        f"model.num_layers={layers}{' + 2' if p.embedding_and_loss_as_layers else ''} is not a multiple of "
        f"parallel.pipeline={p.pipeline} x virtual_pipeline={p.virtual_pipeline} = {chunks}{hint}"
    ]


def uses_portable_layers(config: UncheckedConfig, *, has_transformer_engine: bool) -> bool:
    """Whether a run uses the portable layers, which is without Transformer Engine and in fp32.

    In fp32 Transformer Engine has no fused attention for packed rows. 2.9 and 2.10 have no attention at all
    for them. 2.11 has one that does not support context parallelism and stores the scores of all pairs of
    tokens.
    """
    return not has_transformer_engine or config.precision.dtype == "fp32"


def uses_portable_attention(config: UncheckedConfig, *, has_transformer_engine: bool) -> bool:
    """Whether a run uses the portable attention, which may also be inside Transformer Engine's layers.

    Responses that share a prompt need it, because Transformer Engine's packed attention does not support
    them.
    """
    return config.shares_prompts or uses_portable_layers(
        config, has_transformer_engine=has_transformer_engine
    )


def world_errors(
    config: UncheckedConfig,
    *,
    world_size: int,
    has_gpu: bool,
    has_transformer_engine: bool,
    capability: tuple[int, int] | None = None,
    cuda: str | None = None,
    transformer_engine: str | None = None,
) -> list[str]:
    """Every reason why this config cannot run on these ranks. Empty if it can.

    capability: compute capability of the GPUs. cuda: the CUDA version that torch is built for.
    transformer_engine: its version. Each of these is None if it is unknown.
    """
    errors = _rank_errors(config, world_size)
    if config.precision.fp8 and not (has_gpu and has_transformer_engine):
        missing = "a GPU" if not has_gpu else f"Transformer Engine (install it: {install_command('cuda')})"
        errors.append(f"precision.fp8={config.precision.fp8} needs {missing}; set precision.fp8=null")
    else:
        errors += fp8.device_errors(config, capability=capability, cuda=cuda)
    errors += switch_machine_errors(
        config,
        has_gpu=has_gpu,
        has_transformer_engine=has_transformer_engine,
        version=transformer_engine,
    )
    if has_gpu:
        errors += _head_errors(config, has_transformer_engine=has_transformer_engine)
    r = config.recompute
    if r.mode == "selective" and "layernorm" in r.modules and not has_transformer_engine:
        # When megatron-core 0.16 recomputes norms, it reads Transformer Engine's FP8 state even without FP8.
        errors.append(
            "recompute.modules with layernorm needs Transformer Engine on a GPU; set "
            f"{fp8.without_norms(config.recompute)}"
        )
    return errors


def _rank_errors(config: UncheckedConfig, world_size: int) -> list[str]:
    """Every reason why this many ranks cannot share the model and the batches."""
    p, batch = config.parallel, config.train.global_batch
    if world_size % p.model_size:
        return [
            f"{world_size} ranks are not a multiple of tensor x pipeline x context = {p.model_size}; "
            "start more ranks or change parallel.*"
        ]
    data_size = world_size // p.model_size
    if batch % data_size:
        return [
            f"train.global_batch={batch} is not a multiple of the {data_size} data-parallel ranks of "
            f"{world_size} ranks"
        ]
    if p.virtual_pipeline > 1 and (batch // data_size) % p.pipeline:
        return [
            f"{batch // data_size} microbatches per data-parallel rank are not a multiple of "
            f"parallel.pipeline={p.pipeline}, which the interleaved schedule needs"
        ]
    return []


def _head_errors(config: UncheckedConfig, *, has_transformer_engine: bool) -> list[str]:
    """The reason why attention on a GPU does not support this width of heads. Empty if it does."""
    m = config.model
    if uses_portable_attention(config, has_transformer_engine=has_transformer_engine):
        # A GPU cannot multiply narrower matrices, by torch/_inductor/kernel/flex/flex_attention.py.
        fits, need = m.head_dim >= 16, "FlexAttention needs at least 16"
    else:
        # FlashAttention 2 supports these widths, by get_attention_backend in Transformer Engine 2.9 to 2.11.
        # cuDNN trains no other widths, by common/fused_attn/fused_attn.cpp. For other widths and without
        # context parallelism, 2.11 would use an attention that stores the scores of all pairs of tokens.
        fits = m.head_dim % 8 == 0 and m.head_dim <= 256
        need = "Transformer Engine's attention needs a multiple of 8 up to 256"
    if fits:
        return []
    return [
        f"model.hidden_size={m.hidden_size} over num_attention_heads={m.num_attention_heads} gives heads of "
        f"{m.head_dim}, and on a GPU {need}; change one of them"
    ]
