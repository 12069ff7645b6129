"""Gradient buffers, distributed optimizer and learning-rate schedule, from megatron-core."""

from collections.abc import Sequence

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import get_model_config

from megatron_post.config.schema import Config
from megatron_post.parallel.topology import Topology


def wrap_data_parallel(
    chunks: Sequence[GPTModel], config: Config, topology: Topology
) -> list[DistributedDataParallel]:
    """Contiguous gradient buffers (fp32), reduce-scattered over the data- and context-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.optimizer.overlap,
        overlap_param_gather=config.optimizer.overlap,
    )
    return [
        DistributedDataParallel(
            get_model_config(chunk), ddp_config, chunk, disable_bucketing=i > 0, pg_collection=topology.groups
        )
        for i, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Adam with its state sharded over data-parallel ranks, and the hooks that megatron-core's schedules
    call.

    Norms (every one-dimensional parameter) carry no weight decay.
    """
    o = config.optimizer
    core = get_model_config(chunks[0])
    settings = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=core.bf16,
        params_dtype=core.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=o.overlap,
    )
    overrides = get_standard_config_overrides(settings)
    if config.stage == "reward":
        factor = config.reward.head_lr_multiplier
        head = ParamKey(name="*output_layer.weight")
        overrides[head] = ParamGroupOverride(max_lr=o.lr * factor, min_lr=o.min_lr * factor)
    optimizer = get_megatron_optimizer(settings, chunks, config_overrides=overrides)
    core.grad_scale_func = optimizer.scale_loss
    core.finalize_model_grads_func = finalize_model_grads
    if o.overlap:
        core.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
        core.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in chunks])
    return optimizer


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Give every data-parallel rank the weights that the others' optimizers update. All ranks call it."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def build_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """Linear warm-up to `lr`, then constant, linear or cosine decay to `min_lr` at the last step."""
    o = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=max(config.train.steps, o.warmup_steps + 1),
        lr_decay_style=o.schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _one_or_list(functions: list) -> object:
    return functions[0] if len(functions) == 1 else functions


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of all ranks' gradients together, before clipping; the same on every rank. Nothing moves."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())
