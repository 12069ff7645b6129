"""The interface of a model that can be converted: a Hugging Face Llama's tensors, read in blocks of rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_post.config.sections import Model

# Rows are read, cast, checksummed and written in blocks of this many bytes. Such a block stays in the cache
# of a core. That is twice as fast as blocks of tens of megabytes, which go through memory at every step.
BLOCK_BYTES = 1024**2
# The files beside the weights that `transformers` needs. Only files with these names are ever copied.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Kind:
    """dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the first dimension."""
        return prod(self.shape[1:]) * self.dtype.itemsize


class ModelSource(Protocol):
    """A model on disk.

    tensors: by Hugging Face's names, in their order. fingerprint: changes when the source changes.
    """

    @property
    def model(self) -> Model: ...
    @property
    def scalar_head(self) -> bool: ...
    @property
    def scores_steps(self) -> bool: ...
    @property
    def tensors(self) -> Mapping[str, Kind]: ...
    @property
    def fingerprint(self) -> str: ...

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        """Fill `out` [rows, ...], which has the tensor's own dtype, with its rows from `row` on."""

    def companions(self) -> dict[str, bytes]:
        """Config and tokenizer files by name, as a Hugging Face directory of this model has them."""

    def documents(self) -> dict[str, bytes]:
        """Training record, model card and legal files by name."""


def read_rows(source: ModelSource, name: str, start: int, end: int) -> Tensor:
    """Rows [start, end) of a tensor, in its own dtype."""
    kind = source.tensors[name]
    out = torch.empty((end - start, *kind.shape[1:]), dtype=kind.dtype)
    source.read_into(name, start, out)
    return out


def row_blocks(kind: Kind, *, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [start, end) that cover all rows. Each is about `block_bytes` large."""
    step = max(1, block_bytes // max(1, kind.row_bytes))
    for start in range(0, kind.shape[0], step):
        yield start, min(start + step, kind.shape[0])


def check_names(found: Mapping[str, object], expected: Mapping[str, object], *, origin: Path) -> None:
    """Raises `ValueError` with the first missing and the first unexpected tensor."""
    missing = [name for name in expected if name not in found]
    extra = sorted(name for name in found if name not in expected)
    if missing:
        raise ValueError(f"{origin}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    if extra:
        raise ValueError(f"{origin}: {len(extra)} tensor(s) that no such Llama has, the first is {extra[0]}")
