"""Saving and resuming: model, optimizer, schedule, generators, data position and the resolved config."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_post.config.load import to_yaml
from megatron_post.config.schema import Config
from megatron_post.parallel.topology import Topology
from megatron_post.train import manifest
from megatron_post.train.converted import check_weights, start_from_weights

# Optimizer state laid out by parameter and not by bucket, so that any layout can resume it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps done, and packs taken from the stream of samples for them."""

    step: int = 0
    consumed_packs: int = 0

    def after(self, packs: int) -> "Position":
        """One optimizer step of `packs` packs later."""
        return Position(self.step + 1, self.consumed_packs + packs)


class Checkpoints:
    """Checkpoints of one run, in `run_dir/checkpoints`."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self.root = Path(config.run_dir) / "checkpoints"

    def save(
        self,
        position: Position,
        chunks: list[Any],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        """Write a checkpoint beside the others and publish it once all of it is on the disk."""
        step = position.step
        partial = manifest.partial_directory(self.root, step)
        if self._topology.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            for stale in self.root.glob(".partial-*"):
                shutil.rmtree(stale)
            partial.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(
            self._sharded_state(chunks, optimizer, is_loading=False),
            str(partial),
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            content_metadata=_METADATA,
        )
        rank = self._topology.rank
        if rank == 0:
            (partial / "config.yaml").write_text(to_yaml(self._config))
        save_file(_generator_states(), partial / f"generators-{rank}.safetensors")
        torch.distributed.barrier()
        files = self._checksum_all(partial)
        if rank == 0:
            state = {
                "scheduler": scheduler.state_dict(),
                "consumed_packs": position.consumed_packs,
                "world_size": self._topology.world_size,
                **self._stream(),
            }
            manifest.publish(self.root, step, files=files, state=state, keep=self._config.checkpoint.keep)
        torch.distributed.barrier()

    def resume(
        self, chunks: list[Any], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> Position:
        """Load the newest intact checkpoint. Returns its position; the start where there is none.

        Damaged checkpoints are named and passed over. Raises `ValueError` where the config would continue
        another stream of samples than the checkpoint's.
        """
        directory = self._newest_intact()
        if directory is None:
            return Position()
        stored = manifest.read_manifest(directory)
        if stored["state"].get("weights_only", False):
            check_weights(directory, stored["state"], self._config)
            start_from_weights(directory, unwrap_model(chunks), optimizer, metadata=_METADATA)
            if self._topology.rank == 0:
                print(f"starting from the weights in {directory}", flush=True)
            return Position()
        self._check_stream(directory, stored["state"])
        loaded = dist_checkpointing.load(
            self._sharded_state(chunks, optimizer, is_loading=True),
            str(directory),
            get_default_load_sharded_strategy(str(directory)),
        )
        for i, chunk in enumerate(unwrap_model(chunks)):
            chunk.load_state_dict(loaded[f"model{i}"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(stored["state"]["scheduler"])
        if stored["state"]["world_size"] == self._topology.world_size:
            _restore_generators(load_file(directory / f"generators-{self._topology.rank}.safetensors"))
        return Position(stored["step"], stored["state"]["consumed_packs"])

    def _sharded_state(
        self, chunks: list[Any], optimizer: MegatronOptimizer, *, is_loading: bool
    ) -> dict[str, Any]:
        state = {
            f"model{i}": chunk.sharded_state_dict(metadata=_METADATA)
            for i, chunk in enumerate(unwrap_model(chunks))
        }
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_METADATA)
        return state

    def _checksum_all(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Each rank hashes every world_size-th file; all get the union."""
        rank, world_size = self._topology.rank, self._topology.world_size
        names = sorted(path.name for path in partial.iterdir())
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, manifest.checksums(partial, names[rank::world_size]))
        return {name: entry for part in parts for name, entry in part.items()}

    def _newest_intact(self) -> Path | None:
        for step in reversed(manifest.published_steps(self.root)):
            directory = manifest.step_directory(self.root, step)
            problems: list[Any] = [None] * self._topology.world_size
            torch.distributed.all_gather_object(problems, self._problem(directory))
            found = [text for text in problems if text is not None]
            if not found:
                return directory
            if self._topology.rank == 0:
                print(f"checkpoint of step {step} is damaged and passed over: {found[0]}", flush=True)
        return None

    def _problem(self, directory: Path) -> str | None:
        try:
            manifest.verify(directory, part=self._topology.rank, parts=self._topology.world_size)
        except manifest.DamagedCheckpoint as error:
            return str(error)
        return None

    def _stream(self) -> dict[str, Any]:
        """What fixes the order of samples besides the step."""
        c = self._config
        return {"seed": c.seed, "store": str(Path(c.data.store).resolve())}

    def _check_stream(self, directory: Path, stored: dict[str, Any]) -> None:
        changed = [
            f"{k}: {stored.get(k)!r} there, {v!r} here"
            for k, v in self._stream().items()
            if stored.get(k) != v
        ]
        if changed:
            raise ValueError(
                f"{directory} was trained on another stream of samples ({'; '.join(changed)}): "
                "restore these values, or choose another run_dir and start from an export"
            )


def _generator_states() -> dict[str, Tensor]:
    """torch's, numpy's and Python's generators and megatron-core's tracked ones, as plain tensors."""
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


def _restore_generators(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    np.random.set_state(
        ("MT19937", states["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached)
    )
    random.setstate((3, tuple(states["python"].tolist()), None))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {k.removeprefix("tracked."): v for k, v in states.items() if k.startswith("tracked.")}
    get_cuda_rng_tracker().set_states(tracked)
