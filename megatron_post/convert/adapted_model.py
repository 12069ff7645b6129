"""A PEFT directory together with its base model, merged while it is read."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_post.convert.adapter_weights import PREFIX, SUFFIXES
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.peft_directory import ADAPTER_CONFIG, PeftDirectory
from megatron_post.convert.publishing.card import documents
from megatron_post.convert.publishing.legal import legal_files
from megatron_post.convert.publishing.record import read_record, record_of_base
from megatron_post.storage.checksums import sha256_of_json


class AdaptedModel:
    """A `ModelSource` of the base model that an adapter names, with the adapter added to its weights.

    The sums are computed in float32 and rounded to the base's dtype. Raises `ValueError` if the adapter names
    no base on this machine, does not fit it, or has the head of a reward model.
    """

    def __init__(self, directory: Path) -> None:
        self._adapter = PeftDirectory(directory)
        config, base = directory / ADAPTER_CONFIG, self._adapter.base
        if base is None or not Path(base).is_dir():
            raise ValueError(
                f"{config}: base_model_name_or_path={base!r} is not a directory here; write the path of the "
                "base model's directory there, or use the merged export of the run (train.export_hf)"
            )
        if self._adapter.head:
            raise ValueError(
                f"{directory} has the head of a reward model; use the merged export of its run "
                "(train.export_hf)"
            )
        self._base = HuggingFaceDirectory(base)
        self.model, self.tensors = self._base.model, self._base.tensors
        self.scalar_head, self.scores_steps = self._base.scalar_head, self._base.scores_steps
        self._adapter.check(self.model)
        self._parts: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def fingerprint(self) -> str:
        return sha256_of_json([self._base.fingerprint, self._adapter.stamp])

    def companions(self) -> dict[str, bytes]:
        return self._base.companions()

    def documents(self) -> dict[str, bytes]:
        made = read_record(self._adapter.directory) or record_of_base(self._base.directory)
        return documents(made, legal_files(self._base.directory), self.companions())

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        self._base.read_into(name, row, out)
        parts = self._parts_of(name)
        if not parts:
            return
        rows = slice(row, row + len(out))
        merged = out.float() + parts["B"][rows] @ parts["A"] * self._adapter.settings.scale
        if "magnitude" in parts:
            lengths = torch.linalg.vector_norm(merged, dim=1)
            merged *= (parts["magnitude"][rows] / lengths)[:, None]
        out.copy_(merged)

    def _parts_of(self, name: str) -> dict[str, Tensor]:
        """The adapter's parts of a weight in float32, or nothing.

        Those of the current weight are kept, because its blocks are read one after another.
        """
        if self._parts[0] != name:
            prefix = PREFIX + name.removesuffix("weight")
            found = {part: prefix + suffix for part, suffix in SUFFIXES.items()}
            self._parts = (
                name,
                {p: self._adapter.read(n).float() for p, n in found.items() if self._adapter.has(n)},
            )
        return self._parts[1]
