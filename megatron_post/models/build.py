"""Builds the model chunks of this pipeline rank from a config."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_post.config import layout
from megatron_post.config.schema import Config
from megatron_post.models.adapted import attach_adapters
from megatron_post.models.llama import Llama
from megatron_post.models.reward_head import RewardHead
from megatron_post.models.rotary import PositionRotary
from megatron_post.models.specs import block_spec, fuse_weight_gradients, has_transformer_engine
from megatron_post.parallel.topology import Topology


def uses_portable_layers(config: Config) -> bool:
    """Whether a run on this machine uses the portable layers instead of Transformer Engine's."""
    return layout.uses_portable_layers(config, has_transformer_engine=has_transformer_engine())


def uses_portable_attention(config: Config) -> bool:
    """Whether a run on this machine uses the portable layers' attention. See `config.layout`."""
    return layout.uses_portable_attention(config, has_transformer_engine=has_transformer_engine())


def padded_vocab_size(config: Config) -> int:
    """Rows of the embedding. With tensor parallelism each rank has a multiple of 128 rows.

    A checkpoint holds only the real rows, so that a run can resume with another tensor-parallel size.
    """
    multiple = 128 * config.parallel.tensor if config.parallel.tensor > 1 else 1
    return -(-config.model.vocab_size // multiple) * multiple


def _leave(values: torch.Tensor) -> None:
    """Leave values uninitialised."""


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's configuration of the model, its layout, precision and recomputation."""
    m, p = config.model, config.parallel
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    interleaved, fused = p.virtual_pipeline > 1, has_transformer_engine()
    full, selective = config.recompute.mode == "full", config.recompute.mode == "selective"
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_key_value_heads,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The values are loaded later, from a directory or from a seed. megatron-core must still call an
        # initialisation, because that is where it marks tensor-parallel parameters.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp8="hybrid" if config.precision.fp8 else None,
        fp8_recipe=config.precision.fp8 or "delayed",
        fp8_param=config.precision.fp8_param_gather,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if interleaved else None,
        account_for_embedding_in_pipeline_split=p.embedding_and_loss_as_layers,
        account_for_loss_in_pipeline_split=p.embedding_and_loss_as_layers,
        context_parallel_size=p.context,
        tp_comm_overlap=p.tp_comm_overlap,
        cp_comm_type=p.cp_comm_type,
        sequence_parallel=p.sequence,
        # The gradient is divided by the count over all ranks and microbatches. A mean of means would weigh a
        # microbatch with few trained tokens like one with many.
        calculate_per_token_loss=True,
        # With two pipeline ranks each is the other's next and previous rank. The batched sends of the
        # interleaved schedule then get mixed up, which gives a wrong loss and no error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Freeing an output after its send is safe on a CUDA stream, which keeps the order. gloo may still be
        # sending it.
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused,
        recompute_granularity="full" if full else ("selective" if selective else None),
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        recompute_modules=list(config.recompute.modules) if selective else None,
    )


def build_model(config: Config, topology: Topology, *, portable: bool | None = None) -> list[Llama]:
    """The model chunks of this rank, one for each virtual pipeline stage. Their values are not yet loaded.

    portable: whether to use the portable layers. The default is `uses_portable_layers(config)`.
    """
    portable = uses_portable_layers(config) if portable is None else portable
    core, virtual = transformer_config(config), config.parallel.virtual_pipeline
    stages = range(virtual) if virtual > 1 else [None]
    return [_chunk(config, core, topology, virtual_stage=stage, portable=portable) for stage in stages]


def _chunk(
    config: Config, core: TransformerConfig, topology: Topology, *, virtual_stage: int | None, portable: bool
) -> Llama:
    m, pipeline, scalar = config.model, config.parallel.pipeline, config.traits.scalar_head
    stage, last = virtual_stage or 0, config.parallel.virtual_pipeline - 1
    model = Llama(
        config=core,
        transformer_layer_spec=block_spec(
            core,
            portable=portable,
            shares_prompts=config.shares_prompts,
            adapted=config.adapter is not None,
            virtual_stage=virtual_stage,
        ),
        vocab_size=padded_vocab_size(config),
        max_sequence_length=m.max_position_embeddings,
        pre_process=topology.pipeline_rank == 0 and stage == 0,
        post_process=topology.pipeline_rank == pipeline - 1 and stage == last,
        share_embeddings_and_output_weights=m.tie_word_embeddings and not scalar,
        position_embedding_type="rope",
        rotary_base=int(m.rope_theta),
        pg_collection=topology.groups,
        vp_stage=virtual_stage,
    )
    model.real_vocab_size = m.vocab_size
    model.scalar_head, model.scores_steps = scalar, config.traits.scores_steps
    model.loss_impl = config.loss.impl
    if scalar and model.post_process:
        model.output_layer = RewardHead(
            core, tensor_group=topology.groups.tp, has_bias=config.traits.scores_steps
        )
    if config.optimizer.gradient_accumulation_fusion:
        fuse_weight_gradients(model)
    model.rotary_pos_emb = PositionRotary(m, device=topology.device, context_group=topology.groups.cp)
    if config.adapter is not None:
        attach_adapters(model, config.adapter, m)
    return model.to(topology.device)
