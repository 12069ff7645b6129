"""Where each rank lands: which node, and which place in the tensor, context, data and pipeline groups."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_post.config.schema import Parallel

Axis = Literal["TP", "CP", "DP", "PP"]


@dataclass(frozen=True)
class Placement:
    """Ranks in megatron-core's order (TP fastest, then CP, DP, PP), `ranks_per_node` of them on each node in
    turn, as `srun --distribution=block` starts them."""

    tensor: int
    context: int
    data: int
    pipeline: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    def axes(self) -> dict[Axis, tuple[int, int]]:
        """Axis -> (its size, distance of neighbours in rank)."""
        return {
            "TP": (self.tensor, 1),
            "CP": (self.context, self.tensor),
            "DP": (self.data, self.tensor * self.context),
            "PP": (self.pipeline, self.tensor * self.context * self.data),
        }

    def node(self, rank: int) -> int:
        """Number of the rank's node."""
        return rank // self.ranks_per_node

    def group(self, axis: Axis, rank: int) -> range:
        """The ranks of `rank`'s group along an axis, in order."""
        size, stride = self.axes()[axis]
        first = rank - (rank // stride % size) * stride
        return range(first, first + size * stride, stride)

    def groups(self, axis: Axis) -> Iterator[range]:
        """Every group along an axis."""
        for rank in range(self.world_size):
            group = self.group(axis, rank)
            if group[0] == rank:
                yield group

    def errors(self) -> list[str]:
        """Why ranks cannot be placed so; empty if they can. Tensor-parallel groups stay inside a node."""
        if self.ranks_per_node % self.tensor:
            return [
                f"parallel.tensor={self.tensor} does not divide the {self.ranks_per_node} ranks of a node: "
                "tensor-parallel groups would cross nodes"
            ]
        return []

    def describe(self, *, max_nodes: int = 8) -> list[str]:
        """Lines for a reader: how far each kind of group reaches, then at most `max_nodes` of the nodes."""
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
    """The placement of a layout on all ranks of `nodes` nodes. They must be a multiple of one replica's."""
    data, rest = divmod(nodes * ranks_per_node, parallel.model_size)
    assert data and not rest, "checked by world_errors"
    return Placement(parallel.tensor, parallel.context, data, parallel.pipeline, ranks_per_node)


def fewest_nodes(parallel: Parallel, *, ranks_per_node: int) -> int:
    """Nodes that hold the model once: the fewest whose ranks are a multiple of TP x CP x PP."""
    return parallel.model_size // math.gcd(parallel.model_size, ranks_per_node)


def _short(ranks: range) -> str:
    shown = [str(rank) for rank in ranks]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]}, {shown[1]}, ..., {shown[-1]}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
