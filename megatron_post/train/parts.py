"""Builds the parts of a run: its ranks, stage, model and trainer."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from megatron.core.utils import get_model_config

from megatron_post.config.schema import Config
from megatron_post.convert.adapter_weights import PREFIX, RandomAdapter, load_adapters
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.peft_directory import open_start
from megatron_post.models.build import build_model, uses_portable_attention
from megatron_post.models.llama import Llama
from megatron_post.models.specs import user_buffers
from megatron_post.parallel.context import sum_over_ranks
from megatron_post.parallel.topology import Topology, parallel_run
from megatron_post.stages.base import Stage
from megatron_post.stages.comparisons import SegmentSums
from megatron_post.stages.dpo import DPO
from megatron_post.stages.pretrain import Pretrain
from megatron_post.stages.reward import Reward
from megatron_post.stages.sft import SFT
from megatron_post.stages.step_reward import StepReward
from megatron_post.train.callbacks import Callback
from megatron_post.train.checkpoint import Checkpoints, Position
from megatron_post.train.fence import claim_together
from megatron_post.train.guard import Guard
from megatron_post.train.metrics import ConsoleLines, MetricsWriter
from megatron_post.train.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_post.train.signals import StopRequest
from megatron_post.train.step import Stepper
from megatron_post.train.trackers import make_trackers
from megatron_post.train.trainer import Trainer


@contextlib.contextmanager
def joined_ranks(config: Config) -> Iterator[Topology]:
    """Join this process to the ranks of a run, with the communication buffers that its layers need."""
    with parallel_run(config.parallel, seed=config.seed) as topology, user_buffers(config):
        yield topology


def make_stage(config: Config, topology: Topology) -> Stage:
    """The stage that the config names."""
    if config.stage == "sft":
        return SFT(config.loss.trained_roles)
    if config.stage == "step_reward":
        return StepReward()
    if config.stage == "pretrain":
        return Pretrain(config.pretrain.attention)
    group = topology.groups.cp
    # A segment's tokens are split over the context-parallel ranks, so its sum is too. Every rank of the group
    # then has the whole sum, and only the first one counts it: otherwise pairs would count CP times.
    sums = SegmentSums(
        partial(sum_over_ranks, group=group) if group.size() > 1 else None,
        size=group.size(),
        is_counted=topology.context_rank == 0,
    )
    return Reward(config.reward, sums) if config.stage == "reward" else DPO(config.dpo, sums)


def load_model(config: Config, topology: Topology, *, trained: bool = False) -> list[Llama]:
    """Build this rank's model chunks and load the initial weights into them.

    trained: an optimizer will update the weights. Only such weights are kept in FP8, and only such models
    have adapters.
    """
    if not trained:
        precision = config.precision.model_copy(update={"fp8_param_gather": False})
        config = config.model_copy(update={"precision": precision, "adapter": None})
    chunks = build_model(config, topology)
    weights = open_weights(
        config.model,
        seed=config.seed,
        scalar_head=config.traits.scalar_head,
        scores_steps=config.traits.scores_steps,
    )
    load_weights(chunks, weights, config.model)
    if config.adapter is not None:
        _start_adapters(config, chunks)
    return chunks


def _start_adapters(config: Config, chunks: list[Llama]) -> None:
    """Give adapters their initial values. A directory may also have a reward model's head."""
    assert config.adapter is not None
    if config.adapter.init_from is None:
        load_adapters(chunks, RandomAdapter(config.adapter, config.model, seed=config.seed))
        return
    start = open_start(config)
    load_adapters(chunks, start)
    if chunks[-1].post_process:
        with torch.no_grad():
            for name in start.head:
                parameter = chunks[-1].output_layer.get_parameter(name.removeprefix("score."))
                parameter.copy_(start.read(PREFIX + name))


def build_trainer(
    config: Config,
    topology: Topology,
    *,
    stop: StopRequest | None = None,
    sources: Sequence[str] = (),
    content: Mapping[str, str | None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Trainer, Position]:
    """Build a trainer at the newest intact checkpoint or at the initial weights. Also returns the position.

    From here on the run belongs to this incarnation. stop: records signals that ask the run to stop. sources:
    names of the store's sources, for messages. content: digests of the data and weights, see `RunSettings`.
    callbacks: those of the user.

    Raises `Superseded` if a newer incarnation has claimed the run, and `ValueError` if the config belongs to
    another run.
    """
    fence = claim_together(config.run_dir, topology)
    checkpoints = Checkpoints(config, topology, fence, content=content)
    # A damaged checkpoint or a refused config is found here, before the model is built.
    found = checkpoints.find()
    guard = Guard(config, topology, stop or StopRequest(), sources, fence)
    stage = make_stage(config, topology)
    models = load_model(config, topology, trained=True)
    reference = _load_reference(config, topology) if config.copies_reference else None
    chunks = wrap_data_parallel(models, config, topology)
    optimizer = build_optimizer(chunks, config)
    scheduler = build_scheduler(optimizer, config)
    core = get_model_config(chunks[0])
    # The schedule calls this hook after the last backward pass. Waiting for slower ranks begins there, so the
    # heartbeat counts it as a section of its own.
    core.finalize_model_grads_func = guard.heartbeat.entering(
        "reduce gradients", core.finalize_model_grads_func
    )
    start = checkpoints.load(found, chunks, optimizer, scheduler)
    metrics = MetricsWriter(
        config.run_dir,
        active=topology.is_reporter,
        trackers=make_trackers(config) if topology.is_reporter else (),
        may_write=lambda: fence.is_current,
        ranks=topology.world_size,
        device=torch.cuda.get_device_name() if topology.device.type == "cuda" else "CPU",
    )
    own = [metrics, ConsoleLines(config.train, metrics.console)]
    trainer = Trainer(
        config,
        topology,
        chunks=chunks,
        stepper=Stepper(
            chunks,
            stage,
            topology,
            portable=uses_portable_attention(config),
            reference=chunks if config.runs_reference and reference is None else reference,
            dropout_seed=config.seed if config.adapter is not None and config.adapter.dropout else None,
        ),
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoints=checkpoints,
        metrics=metrics,
        guard=guard,
        callbacks=[*own, *callbacks] if topology.is_reporter else [],
    )
    return trainer, start


def _load_reference(config: Config, topology: Topology) -> list[Llama]:
    chunks = load_model(config, topology)
    for chunk in chunks:
        # Layers recompute in training mode only. The reference has no backward pass that would need it.
        chunk.eval()
    return chunks
