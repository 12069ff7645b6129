"""A whole training run: it checks the config, builds every part once, and gives the parts to the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.utils import unwrap_model

from megatron_post.config.layout import microbatch_multiple
from megatron_post.config.load import SettingsSource, section_of
from megatron_post.config.schema import Config
from megatron_post.convert.hf_reader import open_weights
from megatron_post.convert.hf_writer import export_hf
from megatron_post.convert.peft_directory import open_start
from megatron_post.convert.peft_writer import export_adapter, merged_weights
from megatron_post.convert.publishing.record import DataShare
from megatron_post.convert.publishing.run_record import ORIGIN, run_documents, write_origin
from megatron_post.data.loader import eval_packs
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.models.build import uses_portable_layers
from megatron_post.parallel.topology import Topology
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.manifest import published_steps, step_directory
from megatron_post.train.callbacks import Callback, checked
from megatron_post.train.checkpoint import Position
from megatron_post.train.data_checks import check_trained
from megatron_post.train.fp8_weights import exact_weights
from megatron_post.train.inputs import check_run, open_loader, open_stores
from megatron_post.train.optimizer import gather_weights
from megatron_post.train.parts import build_trainer, joined_ranks, make_stage
from megatron_post.train.reference import attach_reference, weights_digests
from megatron_post.train.signals import Requeue, StopRequest
from megatron_post.train.skips import RollBack
from megatron_post.train.step_lines import read_steps
from megatron_post.train.trainer import Trainer
from megatron_post.train.watchdog import Watchdog


@dataclass(frozen=True)
class Trained:
    """The result of `train`, which is the same on all ranks.

    is_finished: False if a signal asked the run to stop. The same call then continues it. step: the step of
    the newest checkpoint. checkpoint, model, adapter: directories, or None if the run has none of this kind.
    model: a Hugging Face directory, with `train.export_hf`. adapter: a PEFT directory.
    """

    run_dir: Path
    is_finished: bool
    step: int
    checkpoint: Path | None
    model: Path | None
    adapter: Path | None

    def history(self, kind: Literal["train", "eval"] = "train") -> list[dict[str, Any]]:
        """The metrics of each step or evaluation of the whole run, as `metrics.jsonl` has them."""
        return read_steps(self.run_dir / "metrics.jsonl", kind)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the last step that was reported. Empty if there was none."""
        return (self.history() or [{}])[-1]

    @property
    def evaluation(self) -> dict[str, Any]:
        """The metrics of the last evaluation. Empty if there was none."""
        return (self.history("eval") or [{}])[-1]


def train(config: Config | SettingsSource, *, callbacks: Sequence[Callback] = ()) -> Trained:
    """Train to the last step of a config, starting from the newest intact checkpoint of the run.

    config: also a YAML file, or its keys and values. callbacks: called after steps, evaluations and saves,
    see `Callback`. Call this in the main thread, since Python handles signals there only.

    Raises `ConfigError` or another `ValueError` before the model is built if the user can correct the input.
    Raises `CallbackFailed` if a callback raises an exception.
    """
    is_finished, users, config = True, checked(callbacks), section_of(Config, config)
    try:
        if _train(config, users):
            from megatron_post.train.report import try_run_report  # imports matplotlib

            try_run_report(Path(config.run_dir))
    except Requeue:
        is_finished = False
    run_dir = Path(config.run_dir)
    root = run_dir / "checkpoints"
    step = max(published_steps(root), default=0)
    has_model = is_finished and config.train.export_hf
    has_adapter = is_finished and config.adapter is not None
    return Trained(
        run_dir,
        is_finished,
        step,
        checkpoint=step_directory(root, step) if step_directory(root, step).exists() else None,
        model=run_dir / "hf" if has_model else None,
        adapter=run_dir / "adapter" if has_adapter else None,
    )


def _train(config: Config, callbacks: Sequence[Callback]) -> bool:
    """Check the config, build all parts, train and export. Returns whether this is the rank that reports.

    Raises `Requeue` if a signal asked to stop.
    """
    tokenizer = check_run(config)
    train_store, held_out = open_stores(config, tokenizer)
    # Opening checks that the weights belong to this model, before any rank joins a process group.
    traits, adapter = config.traits, config.adapter
    open_weights(
        config.model,
        seed=config.seed,
        scalar_head=traits.scalar_head,
        scores_steps=traits.scores_steps,
    )
    if adapter is not None and adapter.init_from is not None:
        open_start(config)
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
            "adapter.init_from": _adapter_digest(config, topology),
        }
        sources = [source.name for source in train_store.sources]
        trainer, start = build_trainer(
            config, topology, stop=stop, sources=sources, content=content, callbacks=callbacks
        )
        metrics = trainer.metrics
        metrics.console(f"{config.run_dir}: {_summary(config, topology, train_store)}")
        if topology.rank == 0 and not (start.step and (Path(config.run_dir) / ORIGIN).is_dir()):
            write_origin(config, _data_shares(train_store))
        if start.step:
            metrics.console(_where(config, start.step))
        packs = [] if held_out is None else _held_out_packs(config, held_out, topology)
        # Each incarnation has its own directory. The file `hung` of an earlier one would end this one.
        watchdog = Watchdog(
            Path(config.run_dir) / "watchdog" / f"epoch-{trainer.checkpoints.epoch}",
            topology,
            trainer.guard.heartbeat,
            deadline=config.train.step_deadline,
        )
        with watchdog:
            _fit_with_rollbacks(trainer, train_store, packs, start=start)
        _export(trainer, tokenizer)
        metrics.close()
        return topology.is_reporter


def _where(config: Config, step: int) -> str:
    """A line that says where a run goes on."""
    if step < config.train.steps:
        return f"resumed after step {step}"
    return f"already finished: all {step} steps are done. A larger train.steps would continue the run"


def _adapter_digest(config: Config, topology: Topology) -> str | None:
    """A digest of the adapter that the run starts from, or None. All ranks must call it."""
    if config.adapter is None or config.adapter.init_from is None:
        return None
    return sha256_of_json(weights_digests(config.adapter.init_from, topology))


def _data_shares(store: PackStore) -> list[DataShare]:
    """The tokens of each source in a store, with repeats."""
    number, length = store.column("source"), store.column("length")
    tokens = np.bincount(number, weights=length, minlength=len(store.sources))
    return [
        DataShare(name=source.name, tokens=int(count))
        for source, count in zip(store.sources, tokens, strict=True)
    ]


def _held_out_packs(config: Config, store: PackStore, topology: Topology) -> list[Pack]:
    """This rank's packs of an evaluation."""
    return list(
        eval_packs(
            store,
            config.train.eval_packs,
            data_rank=topology.data_rank,
            data_size=topology.data_size,
            multiple=microbatch_multiple(config),
        )
    )


def _export(trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Write the trained adapter as a PEFT directory, and the model as a Hugging Face directory if configured.

    The weights of the model are merged with the adapter.
    """
    config, directory = trainer.config, Path(trainer.config.run_dir)
    if config.optimizer.overlap:
        # With overlap the next forward pass gathers the updated weights. There is none after the last step,
        # so the other ranks' parts of the weights are still stale here.
        gather_weights(trainer.chunks)
    chunks, adapter = unwrap_model(trainer.chunks), config.adapter
    documents = partial(run_documents, config, directory, config.train.steps)
    if adapter is not None:
        target = export_adapter(
            chunks, adapter, config.model, trainer.topology, directory / "adapter", documents=documents
        )
        trainer.metrics.console(f"exported the adapter to {target}")
    if config.train.export_hf:
        value_of = exact_weights(trainer.optimizer) if adapter is None else merged_weights(chunks)
        target = directory / "hf"
        export_hf(
            chunks, config.model, tokenizer, trainer.topology, target, value_of=value_of, documents=documents
        )
        trainer.metrics.console(f"exported to {target}")


def _fit_with_rollbacks(
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


def _summary(config: Config, topology: Topology, store: PackStore) -> str:
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
