"""Saves and resumes the model, the optimizer, random generators, the data position and the config."""

import dataclasses
import io
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial as partial_function
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import Tensor

from megatron_post.config.load import to_yaml
from megatron_post.config.schema import Config
from megatron_post.display import say
from megatron_post.models.adapter_state import checkpoint_state
from megatron_post.parallel.topology import Topology
from megatron_post.storage import manifest
from megatron_post.train.async_save import Save, SaveFailed, Saver
from megatron_post.train.fence import Fence, Superseded
from megatron_post.train.loading import METADATA, load_checkpoint
from megatron_post.train.optimizer import common_optimizer_state, place_scheduler
from megatron_post.train.resume import Found, Resuming, State, change_lines
from megatron_post.train.shards import optimizer_parts, own_objects, own_shards
from megatron_post.train.step_lines import StepLines


@dataclass(frozen=True)
class Position:
    """A run's position: the number of optimizer steps, and of packs consumed from the stream of samples."""

    step: int = 0
    consumed_packs: int = 0

    def after(self, packs: int) -> "Position":
        """The position after one more optimizer step, which consumes `packs` packs."""
        return Position(self.step + 1, self.consumed_packs + packs)


class Checkpoints:
    """The checkpoints of one run, in `run_dir/checkpoints`."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        fence: Fence,
        *,
        content: Mapping[str, str | None] | None = None,
    ) -> None:
        """content: digests of the data and weights that the config names. See `RunSettings`."""
        self._config, self._topology, self._fence = config, topology, fence
        self.root = Path(config.run_dir) / "checkpoints"
        self._resuming = Resuming(config, topology, self.root, fence.run, content or {})
        self._passed_over: frozenset[int] = frozenset()
        self._saver = Saver(topology.rank, topology.world_size, topology.device)
        self._attempts = 0
        self._begun: list[int] = []

    def save(self, position: Position, chunks: list[Any], optimizer: MegatronOptimizer) -> None:
        """Begin a checkpoint. It becomes visible once all of it is on the disk.

        The caller must call `wait_for_copy` before the parameters change. `failed` reports errors.
        """
        began = time.perf_counter()
        rank, step = self._topology.rank, position.step
        # After a rollback a step can be saved twice. Each attempt has its own partial directory.
        self._attempts += 1
        partial = manifest.partial_directory(self.root, step, epoch=self._fence.epoch, attempt=self._attempts)
        models = [checkpoint_state(chunk, METADATA) for chunk in unwrap_model(chunks)]
        model_state = {str(i): state for i, state in enumerate(models)}
        small = {f"generators-{rank}.safetensors": save_bytes(_generator_states())}
        publish = None
        if rank == 0:
            small |= self._common_files(optimizer)
            run = self._resuming.settings
            state = State(
                run=self._fence.run,
                incarnation=self._fence.incarnation,
                settings=dict(run.values),
                content=dict(run.content),
                consumed_packs=position.consumed_packs,
                world_size=self._topology.world_size,
            )
            # The run itself has now reached this step, so it may replace an unusable checkpoint of this
            # number.
            self._passed_over -= {step}
            settings = self._config.checkpoint
            publish = partial_function(
                manifest.publish,
                self.root,
                step,
                state=state.model_dump(),
                keep=settings.keep,
                keep_every=settings.keep_every,
                partial=partial,
                check=self._fence.check,
                passed_over=self._passed_over,
            )
        shards, objects = list(own_shards(model_state, optimizer)), own_objects(model_state)
        save = Save(partial, shards, objects, small, publish)
        self._begun += [step] * self._topology.is_reporter
        self._saver.stalled += time.perf_counter() - began
        self._saver.start(save, asynchronous=self._config.checkpoint.asynchronous)

    def newly_published(self) -> list[tuple[int, Path]]:
        """Steps and directories of saves that have appeared since the last call. Empty if not the reporter.

        The first rank publishes, and the reporter may be another one. So it looks for the directory.
        """
        found = [step for step in self._begun if manifest.step_directory(self.root, step).exists()]
        self._begun = [step for step in self._begun if step not in found]
        return [(step, manifest.step_directory(self.root, step)) for step in found]

    @property
    def epoch(self) -> int:
        """The number of this incarnation of the run."""
        return self._fence.epoch

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of a save."""
        return self._saver.error is not None

    @property
    def stalled(self) -> float:
        """Seconds that training has waited for saves so far."""
        return self._saver.stalled

    def wait_for_copy(self) -> None:
        """Return once parameters and Adam's state may change."""
        self._saver.wait_for_copy()

    def wait(self) -> None:
        """Return once all saves are published. All ranks must call this, even if a rank has `failed`.

        Raises `SaveFailed` on all ranks with every rank's reason.
        """
        if not self.failed:
            self._saver.wait()
        errors: list[Any] = [None] * self._topology.world_size
        own = self._own_failure()
        torch.distributed.all_gather_object(errors, None if own is None else f"{type(own).__name__}: {own}")
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        if lines:
            raise SaveFailed(
                "a checkpoint could not be saved, earlier ones are unchanged\n  " + "\n  ".join(lines)
            )

    def _own_failure(self) -> Exception | None:
        """The reason why this rank's part of a save failed.

        A newer incarnation deletes the unfinished files of older ones. Missing files are then only a symptom,
        and the reason is that this incarnation has been superseded.
        """
        if self._saver.error is not None:
            try:
                self._fence.check()
            except Superseded as superseded:
                return superseded
        return self._saver.error

    def find(self) -> Found | None:
        """The checkpoint to resume from, see `Resuming.find`. All ranks must call this method."""
        self._saver.wait()  # a save in progress will be the newest checkpoint
        found = self._resuming.find()
        self._passed_over = frozenset() if found is None else found.passed_over
        return found

    def load(
        self,
        found: Found | None,
        chunks: list[Any],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> Position:
        """Load the checkpoint that `find` returned. Returns its position, or step 0 if there is none.

        Raises `DamagedCheckpoint` if it belongs to another model.
        """
        if found is None:
            return Position()
        load_checkpoint(found.source, chunks, optimizer, weights_only=found.state.weights_only)
        directory = found.source.directory
        if found.state.weights_only:
            if self._topology.rank == 0:
                say(f"starting from the weights in {directory}")
            return Position()
        place_scheduler(scheduler, after=found.step)
        # Generator states belong to ranks. With another number of ranks they begin at the seed.
        if found.state.world_size == self._topology.world_size:
            _restore_generators(directory / f"generators-{self._topology.rank}.safetensors")
        if found.changes and self._topology.rank == 0:
            self._record(found)
        return Position(found.step, found.state.consumed_packs)

    def _record(self, found: Found) -> None:
        """Print the changed settings, and record them in `run_dir/changes.jsonl`."""
        for line in change_lines(found.step, found.changes):
            say(line)
        StepLines(self.root.parent / "changes.jsonl").write(
            step=found.step,
            time=time.time(),
            incarnation=self._fence.incarnation,
            changes={change.key: [change.before, change.after] for change in found.changes},
        )

    def _common_files(self, optimizer: MegatronOptimizer) -> dict[str, bytes]:
        """The files that are identical on all ranks, under the names that megatron-core expects."""
        state = common_optimizer_state(optimizer_parts(optimizer))
        common = io.BytesIO()
        sharding = METADATA["distrib_optim_sharding_type"]
        torch.save({"optimizer": state | {"param_state_sharding_type": sharding}}, common)
        backends = dataclasses.asdict(CheckpointingConfig("torch_dist", 1))
        return {
            "config.yaml": to_yaml(self._config).encode(),
            "common.pt": common.getvalue(),
            "metadata.json": json.dumps(backends).encode(),
        }


def _generator_states() -> dict[str, Tensor]:
    """States of torch's, numpy's, Python's and megatron-core's tracked generators, as plain tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    assert kind == "MT19937" and version == 3 and gauss is None
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {
        f"tracked.{name}": state.clone() for name, state in get_cuda_rng_tracker().get_states().items()
    }


def _restore_generators(path: Path) -> None:
    """Restore random generators. Raises `DamagedCheckpoint` if the file does not hold their states."""
    try:
        _set_generators(load_file(path))
    except Exception as error:  # damage in a file that another process wrote can raise any error
        raise manifest.DamagedCheckpoint(f"{path}: no states of generators: {error}") from error


def _set_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", states["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached)
    )
    random.setstate((3, tuple(states["python"].tolist()), None))
    if ("cuda" in states) != torch.cuda.is_available():
        # The checkpoint was written on another kind of device. Its generators have another form of state, so
        # the device's and the tracked generators begin at the seed.
        return
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {k.removeprefix("tracked."): v for k, v in states.items() if k.startswith("tracked.")}
    get_cuda_rng_tracker().set_states(tracked)
