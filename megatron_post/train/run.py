"""A whole training run: it checks the config, builds every part once, and gives the parts to the trainer."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from megatron.core.utils import get_model_config, unwrap_model

from megatron_post.config.layout import segment_multiple, store_layout, world_errors
from megatron_post.config.load import raise_for
from megatron_post.config.schema import Config
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import export_hf
from megatron_post.data.dali import DaliLoader
from megatron_post.data.loader import PackLoader, eval_packs
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import GroupName
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of
from megatron_post.models.build import build_model, uses_portable_attention, uses_portable_layers
from megatron_post.models.llama import Llama
from megatron_post.models.specs import has_transformer_engine, transformer_engine_version, user_buffers
from megatron_post.parallel.context import sum_over_ranks
from megatron_post.parallel.topology import Topology, parallel_run, rank_from_environment
from megatron_post.stages.base import Stage
from megatron_post.stages.comparisons import SegmentSums
from megatron_post.stages.dpo import DPO
from megatron_post.stages.reward import Reward
from megatron_post.stages.sft import SFT
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.train.checkpoint import Checkpoints, Position
from megatron_post.train.data_checks import check_sources, check_trained
from megatron_post.train.fence import claim_together
from megatron_post.train.fp8_weights import exact_weights
from megatron_post.train.guard import Guard
from megatron_post.train.metrics import MetricsWriter
from megatron_post.train.optimizer import build_optimizer, build_scheduler, gather_weights, wrap_data_parallel
from megatron_post.train.reference import attach_reference, weights_digests
from megatron_post.train.signals import Requeue, StopRequest
from megatron_post.train.skips import RollBack
from megatron_post.train.step import Stepper
from megatron_post.train.trainer import Trainer
from megatron_post.train.watchdog import Watchdog


def train(config: Config) -> None:
    """Train to the last step of a config, starting from the newest intact checkpoint of the run.

    Raises `ConfigError` or another `ValueError` before the model is built if the user can correct the input.
    """
    tokenizer = check_run(config)
    train_store, held_out = open_stores(config, tokenizer)
    # Opening checks that the weights belong to this model, before any rank joins a process group.
    open_weights(config.model, seed=config.seed, scalar_head=config.traits.scalar_head)
    with StopRequest() as stop, joined_ranks(config) as topology:
        check_trained(config, make_stage(config, topology), [train_store, held_out], topology)
        start_from = config.model.init_from
        digests = None if start_from is None else weights_digests(start_from, topology)
        attach_reference(config, topology, [train_store, held_out], digests=digests)
        content = {
            "data.store": train_store.digest,
            "data.eval_sources": None if held_out is None else held_out.digest,
            "tokenizer.path": tokenizer.fingerprint,
            "model.init_from": None if digests is None else sha256_of_json(digests),
        }
        sources = [source.name for source in train_store.sources]
        trainer, start = build_trainer(config, topology, stop=stop, sources=sources, content=content)
        metrics = trainer.metrics
        metrics.console(f"{config.run_dir}: {run_summary(config, topology, train_store)}")
        if start.step:
            metrics.console(f"resumed after step {start.step}")
        # The interleaved schedule needs a number of microbatches that the pipeline size divides.
        packs = [] if held_out is None else list(
            eval_packs(
                held_out,
                config.train.eval_packs,
                data_rank=topology.data_rank,
                data_size=topology.data_size,
                multiple=config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1,
            )
        )  # fmt: skip
        # Each incarnation has its own directory. The file `hung` of an earlier one would end this one.
        watchdog = Watchdog(
            Path(config.run_dir) / "watchdog" / f"epoch-{trainer.checkpoints.epoch}",
            topology,
            trainer.guard.heartbeat,
            deadline=config.train.step_deadline,
        )
        with watchdog:
            fit_with_rollbacks(trainer, train_store, packs, start=start)
        if config.train.export_hf:
            target = Path(config.run_dir) / "hf"
            if config.optimizer.overlap:
                # With overlap the next forward pass gathers the updated weights. There is none after the
                # last step, so the other ranks' parts of the weights are still stale here.
                gather_weights(trainer.chunks)
            chunks, value_of = unwrap_model(trainer.chunks), exact_weights(trainer.optimizer)
            export_hf(chunks, config.model, tokenizer, topology, target, value_of=value_of)
            metrics.console(f"exported to {target}")
        metrics.close()


@contextlib.contextmanager
def joined_ranks(config: Config) -> Iterator[Topology]:
    """Join this process to the ranks of a run, with the communication buffers that its layers need."""
    with parallel_run(config.parallel, seed=config.seed) as topology, user_buffers(config):
        yield topology


def fit_with_rollbacks(
    trainer: Trainer, store: PackStore, held_out: Sequence[Pack], *, start: Position
) -> None:
    """Train to the last step, and return to the newest checkpoint whenever the trainer raises `RollBack`.

    Raises `Requeue` if there is no checkpoint. The next start then begins from the initial weights.
    """
    while True:
        trainer.metrics.begin(after=start.step)
        trainer.guard.begin_run(after=start.step)
        with open_loader(trainer.config, store, trainer.topology, start) as loader:
            try:
                trainer.fit(loader, held_out, start=start)
                return
            except RollBack:
                found = trainer.checkpoints.find()
                start = trainer.checkpoints.load(found, trainer.chunks, trainer.optimizer, trainer.scheduler)
        if not start.step:
            trainer.metrics.console(
                "train.on_not_finite=rollback: no checkpoint to go back to, so the run asks for a "
                "requeue. The same command starts again from the initial weights and skips the packs that "
                "were not finite"
            )
            raise Requeue
        trainer.metrics.console(f"rolled back to step {start.step}")


def check_run(config: Config) -> Tokenizer:
    """Check a config against the ranks that it runs on. Raises `ConfigError` with every error found."""
    errors = rank_errors(config, world_size=rank_from_environment()[1])
    tokenizer = tokenizer_of(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        errors.append(
            f"the tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} ids, "
            f"more than model.vocab_size={config.model.vocab_size}"
        )
    raise_for(errors)
    return tokenizer


def rank_errors(config: Config, *, world_size: int) -> list[str]:
    """Reasons why this config cannot run on `world_size` ranks of this machine's kind. Empty if it can."""
    has_gpu, local_rank = torch.cuda.is_available(), rank_from_environment()[2]
    if has_gpu and local_rank >= (count := torch.cuda.device_count()):
        return [
            f"this is local rank {local_rank}, counted from 0, and it sees {count} GPUs; start at most one "
            "rank for each GPU of a node, or show it more in CUDA_VISIBLE_DEVICES"
        ]
    return world_errors(
        config,
        world_size=world_size,
        has_gpu=has_gpu,
        has_transformer_engine=has_transformer_engine(),
        capability=torch.cuda.get_device_capability(local_rank) if has_gpu else None,
        cuda=torch.version.cuda,
        transformer_engine=transformer_engine_version(),
    )


def open_stores(config: Config, tokenizer: Tokenizer) -> tuple[PackStore, PackStore | None]:
    """Open the packed training data, and the held-out data if `data.eval_sources` names any.

    Raises `StoreError` if a store does not fit the config, or has other sources than the config names.
    """

    def opened(group: GroupName) -> PackStore:
        store = open_store(
            config.data.store,
            group,
            pack_length=config.data.pack_length,
            segment_multiple=segment_multiple(config),
            tokenizer_fingerprint=tokenizer.fingerprint,
            layout=store_layout(config),
            reasoning=config.data.reasoning,
            vocab_size=config.model.vocab_size,
        )
        check_sources(config, store)
        return store

    return opened("train"), opened("eval") if config.data.eval_sources else None


def open_loader(
    config: Config, store: PackStore, topology: Topology, start: Position
) -> PackLoader | DaliLoader:
    """This rank's stream of packs from `start` on, read by the backend that the config names."""
    loader = PackLoader(
        store,
        seed=config.seed,
        global_batch=config.train.global_batch,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        prefetch=config.data.prefetch,
        consumed_packs=start.consumed_packs,
    )
    if config.data.backend == "torch":
        return loader
    return DaliLoader(loader, device_id=topology.device.index, prefetch=config.data.prefetch)


def make_stage(config: Config, topology: Topology) -> Stage:
    """The stage that the config names."""
    if config.stage == "sft":
        return SFT(config.loss.trained_roles)
    group = topology.groups.cp
    # A segment's tokens are split over the context-parallel ranks, so its sum is too. Every rank of the group
    # then has the whole sum, and only the first one counts it: otherwise pairs would count CP times.
    sums = SegmentSums(
        partial(sum_over_ranks, group=group) if group.size() > 1 else None,
        size=group.size(),
        is_counted=topology.context_rank == 0,
    )
    return Reward(config.reward, sums) if config.stage == "reward" else DPO(config.dpo, sums)


def build_trainer(
    config: Config,
    topology: Topology,
    *,
    stop: StopRequest | None = None,
    sources: Sequence[str] = (),
    content: Mapping[str, str | None] | None = None,
) -> tuple[Trainer, Position]:
    """Build a trainer at the newest intact checkpoint or at the initial weights. Also returns the position.

    From here on the run belongs to this incarnation. stop: records signals that ask the run to stop. sources:
    names of the store's sources, for messages. content: digests of the data and weights, see `RunSettings`.

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
    reference = None
    if config.runs_reference:
        reference = load_model(config, topology)
        for model in reference:
            # Layers recompute in training mode only. The reference has no backward pass that would need it.
            model.eval()
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
    trainer = Trainer(
        config,
        topology,
        chunks=chunks,
        stepper=Stepper(
            chunks, stage, topology, portable=uses_portable_attention(config), reference=reference
        ),
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoints=checkpoints,
        metrics=MetricsWriter(
            config.run_dir, active=topology.is_reporter, may_write=lambda: fence.is_current
        ),
        guard=guard,
    )
    return trainer, start


def load_model(config: Config, topology: Topology, *, trained: bool = False) -> list[Llama]:
    """Build this rank's model chunks and load the initial weights into them.

    trained: an optimizer will update the weights. Only such weights are kept in FP8.
    """
    if not trained:
        precision = config.precision.model_copy(update={"fp8_param_gather": False})
        config = config.model_copy(update={"precision": precision})
    chunks = build_model(config, topology)
    weights = open_weights(config.model, seed=config.seed, scalar_head=config.traits.scalar_head)
    load_weights(chunks, weights, config.model)
    return chunks


def run_summary(config: Config, topology: Topology, store: PackStore) -> str:
    """One line that describes the run: its stage, layout, size and layers."""
    p = config.parallel
    sizes = {
        "TP": p.tensor,
        "PP": p.pipeline,
        "VPP": p.virtual_pipeline,
        "CP": p.context,
        "DP": topology.data_size,
    }
    layout = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"
    return (
        f"{config.stage} on {layout}{' + SP' if p.sequence else ''}, {config.train.steps} steps of "
        f"{config.train.global_batch} packs of {config.data.pack_length} tokens, {len(store)} packs stored, "
        f"{'portable' if uses_portable_layers(config) else 'Transformer Engine'} layers"
    )
