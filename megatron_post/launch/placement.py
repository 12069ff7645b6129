"""The node of each rank and its position in the tensor, context, data and pipeline groups."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_post.config.sections import Parallel

Axis = Literal["TP", "CP", "DP", "PP"]


@dataclass(frozen=True)
class Placement:
    """Ranks in megatron-core's order, in which TP varies fastest, then CP, DP and PP.

    Each node gets the next `ranks_per_node` ranks, as `srun --distribution=block` starts them.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    def axes(self) -> dict[Axis, tuple[int, int]]:
        """The size of each axis, and the difference in rank between neighbours along it."""
        return {
            "TP": (self.tensor, 1),
            "CP": (self.context, self.tensor),
            "DP": (self.data, self.tensor * self.context),
            "PP": (self.pipeline, self.tensor * self.context * self.data),
        }

    def node(self, rank: int) -> int:
        """The number of the rank's node."""
        return rank // self.ranks_per_node

    def group(self, axis: Axis, rank: int) -> range:
        """The ranks of `rank`'s group along an axis, in order."""
        size, stride = self.axes()[axis]
        first = rank - (rank // stride % size) * stride
        return range(first, first + size * stride, stride)

    def groups(self, axis: Axis) -> Iterator[range]:
        """All groups along an axis."""
        for rank in range(self.world_size):
            group = self.group(axis, rank)
            if group[0] == rank:
                yield group

    def errors(self) -> list[str]:
        """Reasons why this placement cannot be used, such as a tensor-parallel group that crosses nodes."""
        if self.ranks_per_node % self.tensor:
            return [
                f"parallel.tensor={self.tensor} does not divide the {self.ranks_per_node} ranks of a node: "
                "tensor-parallel groups would cross nodes"
            ]
        return []

    def summary(self, *, max_nodes: int = 8) -> list[str]:
        """Lines for printing: the extent of each kind of group and the ranks of at most `max_nodes` nodes."""
        lines = []
        for axis, (size, _) in self.axes().items():
            if size > 1:
                nodes = len({self.node(rank) for rank in self.group(axis, 0)})
                where = "inside a node" if nodes == 1 else f"over {nodes} nodes"
                lines.append(f"{axis} {size}: {where}, ranks {_short(self.group(axis, 0))}, ...")
        nodes = -(-self.world_size // self.ranks_per_node)
        shown = range(nodes) if nodes <= max_nodes else [*range(max_nodes - 1), nodes - 1]
        for number in shown:
            if nodes > max_nodes and number == nodes - 1:
                lines.append("...")
            ranks = range(
                number * self.ranks_per_node, min((number + 1) * self.ranks_per_node, self.world_size)
            )
            spans = "  ".join(
                f"{axis} {_span([r // stride % size for r in ranks])}"
                for axis, (size, stride) in self.axes().items()
                if size > 1
            )
            lines.append(f"node {number}: ranks {ranks[0]}-{ranks[-1]}  {spans}".rstrip())
        return lines


def place(parallel: Parallel, *, nodes: int, ranks_per_node: int) -> Placement:
    """The placement of a layout on `nodes` nodes, whose ranks must be a multiple of one replica's ranks."""
    data, rest = divmod(nodes * ranks_per_node, parallel.model_size)
    assert data and not rest, "checked by world_errors"
    return Placement(parallel.tensor, parallel.context, data, parallel.pipeline, ranks_per_node)


def fewest_nodes(parallel: Parallel, *, ranks_per_node: int) -> int:
    """The fewest nodes whose number of ranks is a multiple of TP x CP x PP."""
    return parallel.model_size // math.gcd(parallel.model_size, ranks_per_node)


def _short(ranks: range) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]}, {shown[1]}, ..., {shown[-1]}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
