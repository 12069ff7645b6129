"""Compares two directories of any kind."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_post.convert.hf_config import differences
from megatron_post.convert.jobs import Report
from megatron_post.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_post.convert.open_model import open_model
from megatron_post.convert.source import Kind, ModelSource, read_rows, row_blocks

# A report has at most this many lines. Further differences are counted.
_LINES = 20


def compare_models(first: str, second: str, *, report: Report) -> None:
    """Compare names, shapes, dtypes, values (bit for bit) and configs of two models.

    Raises `ValueError` with the tensors that differ, each with the first index where it differs.
    """
    a, b = open_model(Path(first)), open_model(Path(second))
    found = list(_differences(a, b))
    if found:
        more = f"\n  and {len(found) - _LINES} more" if len(found) > _LINES else ""
        lines = "\n  ".join(found[:_LINES])
        raise ValueError(f"{first} and {second} differ in {len(found)} place(s)\n  {lines}{more}")
    total = sum(kind.nbytes for kind in a.tensors.values())
    report(f"the same model: {len(a.tensors)} tensors, {total:,} bytes, equal bit for bit")


def _differences(a: ModelSource, b: ModelSource) -> Iterator[str]:
    yield from (
        line.replace("in the config", "in the first").replace("in the weights", "in the second")
        for line in differences(a.model, b.model)
    )
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        if name not in a.tensors or name not in b.tensors:
            yield f"{name}: only in the {'second' if name in b.tensors else 'first'}"
        elif a.tensors[name] != b.tensors[name]:
            yield f"{name}: {_text(a.tensors[name])} and {_text(b.tensors[name])}"
        else:
            yield from _compare(a, b, name)
    for source in (a, b):
        if isinstance(source, MegatronCheckpoint):
            source.checkpoint.finish_checksums()


def _compare(a: ModelSource, b: ModelSource, name: str) -> Iterator[str]:
    count, first = 0, ""
    for start, end in row_blocks(a.tensors[name]):
        left, right = read_rows(a, name, start, end), read_rows(b, name, start, end)
        unequal = _bits(left) != _bits(right)
        if not unequal.any():
            continue
        if not first:
            place = int(unequal.reshape(-1).nonzero()[0])
            index = torch.unravel_index(torch.tensor(place), left.shape)
            where = [int(index[0]) + start, *(int(i) for i in index[1:])]
            values = f"{left.reshape(-1)[place].item()} and {right.reshape(-1)[place].item()}"
            first = f"the first at {where}: {values}"
        count += int(unequal.sum())
    if count:
        yield f"{name}: {count} value(s) differ, {first}"


def _bits(values: Tensor) -> Tensor:
    """The values as integers, so that NaN equals itself and 0 differs from -0."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def _text(kind: Kind) -> str:
    return f"{list(kind.shape)} {kind.dtype}".replace("torch.", "")
