"""A trainer's checkpoint or converted weights, as a source of Hugging Face tensors."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_post.config.load import load_config
from megatron_post.config.schema import Config
from megatron_post.config.sections import Model
from megatron_post.convert.configs import read_model, written_configs
from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.convert.mapping import CoreTensor, RowRange, core_tensors, hf_shapes, row_ranges
from megatron_post.convert.publishing.card import documents_of
from megatron_post.convert.publishing.run_record import run_documents
from megatron_post.convert.source import COMPANIONS, Kind
from megatron_post.data.tokenizer import tokenizer_of
from megatron_post.storage import manifest
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.reading import reading


class MegatronCheckpoint:
    """A `ModelSource` of one published step of a run's checkpoints, saved in any layout of ranks.

    Optimizer state is never read. Raises `ValueError` (`DamagedCheckpoint` and others) if the directory is
    not such a step, or does not hold the model that its config describes.
    """

    def __init__(self, directory: str | Path, *, step: int | None = None) -> None:
        """directory: one step, or the directory of all steps. step: by default the newest."""
        with reading(Path(directory), "a checkpoint of the trainer"):
            self.directory = step_of(Path(directory), step)
            self._manifest = manifest.read_manifest(self.directory)
            self._check_files()
            self.step: int = self._manifest["step"]
            self.weights_only: bool = self._manifest["state"].get("weights_only", False)
            if self.weights_only:
                self.model: Model = read_model(self.directory)
                self.scalar_head: bool = self._manifest["state"]["scalar_head"]
                self.scores_steps: bool = self._manifest["state"].get("scores_steps", False)
            else:
                if self._config.adapter is not None:
                    raise ValueError(
                        f"{self.directory} holds an adapter and not a model; use the exports of its run, "
                        f"{self._config.run_dir}/adapter or {self._config.run_dir}/hf"
                    )
                self.model, traits = self._config.model, self._config.traits
                self.scalar_head, self.scores_steps = traits.scalar_head, traits.scores_steps
            self.checkpoint = DistCheckpoint(self.directory)
        self._runs: dict[str, list[tuple[CoreTensor, RowRange]]] = {}
        dtypes: dict[str, torch.dtype] = {}
        head = {"scalar_head": self.scalar_head, "scores_steps": self.scores_steps}
        for core in core_tensors(self.model, **head):
            dtypes |= dict.fromkeys(core.hf, self._check(core))
            for run in row_ranges(core, self.model):
                self._runs.setdefault(run.name, []).append((core, run))
        shapes = hf_shapes(self.model, **head)
        self.tensors = {name: Kind(dtypes[name], shape) for name, shape in shapes.items()}

    @property
    def fingerprint(self) -> str:
        """A hash of the manifest, which has the checksums of all files."""
        return sha256_of_json(self._manifest)

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        for core, run in self._runs[name]:
            start, end = max(row, run.hf_row), min(row + out.shape[0], run.hf_row + run.rows)
            if start < end:
                place = run.core_row + start - run.hf_row
                self.checkpoint.read_into(core.key, core.layer, place, out[start - row : end - row])

    def companions(self) -> dict[str, bytes]:
        """Config and tokenizer files, as they were converted or as `train.export_hf` writes them."""
        if self.weights_only:
            names = [name for name in COMPANIONS if name in self._manifest["files"]]
            return {name: (self.directory / name).read_bytes() for name in names}
        (dtype,) = {kind.dtype for kind in self.tensors.values()}
        tokenizer = tokenizer_of(self._config)
        return written_configs(
            self.model,
            tokenizer,
            dtype=dtype,
            scalar_head=self.scalar_head,
            scores_steps=self.scores_steps,
        )

    def documents(self) -> dict[str, bytes]:
        if self.weights_only:
            return documents_of(self.directory, self.companions())
        return run_documents(self._config, self.directory.parent.parent, self.step, self.companions())

    @cached_property
    def _config(self) -> Config:
        return load_config(self.directory / "config.yaml")

    def _check_files(self) -> None:
        """Check the sizes of all files, and the content of the small files.

        The small files decide what the bytes of the large files mean. Those are checksummed while they are
        read.
        """
        for name, entry in self._manifest["files"].items():
            small = name in COMPANIONS or name in (".metadata", "config.yaml")
            manifest.check_file(self.directory, name, entry, content=small)

    def _check(self, core: CoreTensor) -> torch.dtype:
        """The dtype of a parameter's tensor. Its vocabulary rows may be padded.

        Raises `ValueError` if the tensor is missing or has another shape.
        """
        kind = self.checkpoint.kinds.get(core.key)
        if kind is None:
            raise ValueError(f"{self.directory}: tensor {core.key} is missing")
        found, expected = kind.shape, core.stored_shape
        if core.rule.layout == "vocabulary" and found[0] >= expected[0]:
            expected = (found[0], *expected[1:])
        if found != expected:
            raise ValueError(f"{self.directory}: {core.key} has shape {found}, expected {expected}")
        return kind.dtype


def step_of(directory: Path, step: int | None) -> Path:
    """The directory of a step. Raises `ValueError` if there is none."""
    if (directory / manifest.MANIFEST).is_file():
        found = manifest.read_manifest(directory)["step"]
        if step not in (None, found):
            raise ValueError(f"{directory} is the checkpoint of step {found}, not of step {step}")
        return directory
    steps = manifest.published_steps(directory)
    if not steps:
        strays = [repr(name) for name in manifest.stray_names(directory) if name.startswith("step-")]
        others = f"; it has {', '.join(strays)}, which are not published checkpoints" if strays else ""
        raise ValueError(f"{directory} holds no published checkpoint{others}")
    if step is not None and step not in steps:
        raise ValueError(f"{directory} has no step {step}; it has {', '.join(map(str, steps))}")
    return manifest.step_directory(directory, steps[-1] if step is None else step)
