"""Selects the tokens whose labels carry loss, so that the output layer computes nothing for the others."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The n trained tokens among the t / cp tokens of a context-parallel rank.

    With sequence parallelism a tensor-parallel rank holds the hidden states of t / cp / tp tokens in a row.
    Ranks have different numbers of trained tokens, but they send equally many rows m. A rank with fewer
    trained tokens fills up with its row 0. Every rank computes all counts from the same mask, so nothing is
    exchanged to find them.

    tokens: int64 [n], indices of the trained tokens, ascending. sent: int64 [m], rows of this rank's hidden
    states. received: int64 [n], the rows of the trained tokens among the tp x m rows of all ranks. own: the
    range of `tokens` that this rank holds. These three are None without sequence parallelism.
    """

    tokens: Tensor
    sent: Tensor | None = None
    received: Tensor | None = None
    own: slice | None = None

    def rows(self, hidden: Tensor, group: Any) -> Tensor:
        """The hidden states [n, h] of the trained tokens, on all tensor-parallel ranks.

        hidden: [t / cp, h], or this rank's [t / cp / tp, h] with sequence parallelism. The gradient that
        comes back must already be summed over the ranks.
        """
        if self.sent is None:
            return hidden.index_select(0, self.tokens)
        rows: Tensor = _GatherRows.apply(hidden, self, group)
        return rows


def select(trained: Tensor, *, rank: int = 0, size: int = 1, sequence_parallel: bool = False) -> Selection:
    """The trained tokens of a context-parallel rank.

    trained: bool [t / cp], on the host, because the number of trained tokens decides the shapes. rank, size:
    of the tensor-parallel group.
    """
    tokens = trained.nonzero()[:, 0]
    if size == 1 or not sequence_parallel:
        return Selection(tokens)
    share = len(trained) // size
    holder = tokens // share
    counts = holder.bincount(minlength=size)
    most, before = int(counts.max()), counts.cumsum(0) - counts
    first, count = int(before[rank]), int(counts[rank])
    own = slice(first, first + count)
    sent = torch.zeros(most, dtype=torch.long)
    sent[:count] = tokens[own] - rank * share
    received = holder * most + torch.arange(len(tokens)) - before[holder]
    return Selection(tokens, sent, received, own)


class _GatherRows(torch.autograd.Function):
    """Gathers the trained rows of all ranks. In the backward pass a rank takes the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, selection: Selection, group: Any) -> Tensor:
        ctx.selection, ctx.shape = selection, hidden.shape
        assert selection.sent is not None and selection.received is not None
        most = len(selection.sent)
        gathered = hidden.new_empty(group.size() * most, hidden.shape[1])
        if most:
            torch.distributed.all_gather_into_tensor(gathered, hidden[selection.sent], group=group)
        return gathered.index_select(0, selection.received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = ctx.selection.own
        result = gradient.new_zeros(ctx.shape)
        result[ctx.selection.sent[: own.stop - own.start]] = gradient[own]
        return result, None, None
