"""Builds megatron-core's gradient buffers, distributed optimizer and learning-rate schedule."""

import contextlib
from collections.abc import Sequence
from typing import Any

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
from megatron_post.parallel.adam import moments_in_bf16
from megatron_post.parallel.topology import Topology
from megatron_post.train.fp8_weights import finish_gather


def wrap_data_parallel(
    chunks: Sequence[GPTModel], config: Config, topology: Topology
) -> list[DistributedDataParallel]:
    """Wrap chunks with fp32 gradient buffers, reduce-scattered over data- and context-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.optimizer.overlap,
        overlap_param_gather=config.optimizer.overlap,
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    return [
        DistributedDataParallel(
            get_model_config(chunk), ddp_config, chunk, disable_bucketing=i > 0, pg_collection=topology.groups
        )
        for i, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Adam with its state sharded over data-parallel ranks. It also sets the schedules' hooks on the model.

    Norm weights (every one-dimensional parameter) have no weight decay.
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
        fp8_recipe=config.precision.fp8,
        overlap_param_gather=o.overlap,
        overlap_param_gather_with_optimizer_step=o.overlap_param_gather_with_optimizer_step,
    )
    overrides = get_standard_config_overrides(settings)
    if config.traits.scalar_head:
        factor = config.reward.head_lr_multiplier
        head = ParamKey(name="*output_layer.*")
        overrides[head] = ParamGroupOverride(max_lr=o.lr * factor, min_lr=o.min_lr * factor)
    with moments_in_bf16() if o.moments == "bf16" else contextlib.nullcontext():
        optimizer = get_megatron_optimizer(settings, chunks, config_overrides=overrides)
    core.grad_scale_func = optimizer.scale_loss
    core.finalize_model_grads_func = finalize_model_grads
    if o.overlap:
        # The schedule uses `no_sync_func` to reduce gradients only after the last microbatch, and the
        # interleaved schedule starts the reduction of each chunk by `grad_sync_func`.
        core.no_sync_func = _one_or_list([chunk.no_sync for chunk in chunks])
        core.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in chunks])
    return optimizer


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Give every data-parallel rank the weights that other ranks' optimizers update.

    All ranks must call it.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
    finish_gather(chunks)


def build_scheduler(optimizer: MegatronOptimizer, config: Config) -> OptimizerParamScheduler:
    """The learning-rate scheduler of a config, placed before step 1.

    Step i of a warm-up of w steps has the rate lr * i / w, so no step has a rate of 0. After the warm-up a
    constant schedule stays at `lr`. A linear or cosine schedule falls to `min_lr`, which it reaches at the
    last step of the run. Without a warm-up the first step has `lr`, even if it is the only step. A run that
    consists of its warm-up ends at `lr`. Weight decay is the same at every step.
    """
    o = config.optimizer
    # megatron-core's warm-up reaches `lr` at its last step. One step of warm-up therefore begins at `lr`.
    warmup_steps = max(o.warmup_steps, 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(config.train.steps, warmup_steps + 1),
        lr_decay_style=o.schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    place_scheduler(scheduler, after=0)
    return scheduler


def place_scheduler(scheduler: OptimizerParamScheduler, *, after: int) -> None:
    """Give the optimizer the learning rate of the step that follows step `after`.

    The schedule is always that of the config. megatron-core's own `load_state_dict` prefers the schedule of
    the checkpoint, and would ignore a change of the config in silence.
    """
    scheduler.step(increment=after + 1 - scheduler.num_steps)


def common_optimizer_state(parts: Sequence[Any]) -> dict[str, Any]:
    """The part of the optimizer in a checkpoint's `common.pt`: its parameter groups, without tensors.

    parts: the distributed optimizers. `overlap_param_gather_with_optimizer_step` makes two of them. A group
    that both have is stored once, so that any number of parts can load the groups.
    """
    state: dict[str, Any] = parts[0].state_dict()
    groups = state["optimizer"]["param_groups"]
    for part in parts[1:]:
        groups += [group for group in part.state_dict()["optimizer"]["param_groups"] if group not in groups]
    return state


def load_optimizer_state(part: Any, stored: dict[str, Any]) -> None:
    """Load the number of Adam's steps from a checkpoint's `common.pt`.

    Learning rates, weight decay, betas and the multiplier of a head stay those of the config. part: one
    distributed optimizer. Its moments are allocated here and filled later.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
    part.load_state_dict(stored)
    for group, settings in zip(part.param_groups, own, strict=True):
        steps = {"step": group["step"]} if "step" in group else {}
        group |= settings | steps


def _one_or_list(functions: list) -> object:
    return functions[0] if len(functions) == 1 else functions


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of the gradients of all ranks before clipping, identical on every rank. Weights do not change."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())
