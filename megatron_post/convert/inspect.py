"""Prints the content of a directory of weights as a table."""

import re
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_post.convert.meta_source import MetaDirectory
from megatron_post.convert.open_model import open_model
from megatron_post.convert.source import Kind, ModelSource

_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def inspect(directory: str, *, console: Console) -> None:
    """Print the model's config, and every tensor with shape, dtype and bytes.

    Layers whose tensors are identical in shape and dtype share a row.
    """
    source = open_model(Path(directory))
    console.print(f"{directory}: {_source_summary(source)}", highlight=False, soft_wrap=True)
    config = source.model.model_dump(exclude={"preset", "init_from"}, exclude_none=True)
    console.print(
        "  ".join(f"{key} {value}" for key, value in config.items()), highlight=False, soft_wrap=True
    )
    kinds = dict(source.tensors)
    if isinstance(source, MegatronCheckpoint):
        kinds = DistCheckpoint(source.directory).kinds
    console.print(_tensor_table(kinds))


def _source_summary(source: ModelSource) -> str:
    """The kind of a source, on one line."""
    if not isinstance(source, MegatronCheckpoint):
        kind = "Meta checkpoint" if isinstance(source, MetaDirectory) else "Hugging Face directory"
        steps = " of steps" if source.scores_steps else ""
        return kind + (f", a reward model{steps}" if source.scalar_head else "")
    content = "weights only" if source.weights_only else "weights and optimizer"
    return f"megatron-core checkpoint, step {source.step}, {content}"


def _tensor_table(kinds: dict[str, Kind]) -> Table:
    """A table of tensors. Tensors whose names differ only in the layer share a row. kinds: by name."""
    rows: dict[tuple[str, Kind], int] = {}
    for name, kind in kinds.items():
        key = (_NUMBER.sub("*", name), kind)
        rows[key] = rows.get(key, 0) + 1
    table = Table(Column("tensor", overflow="fold"), "number", "shape", "dtype", "bytes", box=SIMPLE)
    for (name, kind), count in rows.items():
        dtype = str(kind.dtype).removeprefix("torch.")
        shape = " x ".join(map(str, kind.shape))
        table.add_row(name, f"{count:,}", shape, dtype, f"{kind.nbytes * count:,}")
    total = sum(kind.nbytes for kind in kinds.values())
    table.add_row("all", f"{len(kinds):,}", "", "", f"{total:,}")
    return table
