"""The status that every rank sends to all others once a step, in one small collective.

The exchange takes place before the optimizer updates the weights. All ranks see the same statuses, so all of
them take the same decision at the same step: to skip it, to stop, or to go on.
"""

from dataclasses import astuple, dataclass

import torch

from megatron_post.parallel.topology import Topology


@dataclass(frozen=True)
class RankStatus:
    """One rank's status at one step.

    bad_loss: a loss of this rank is not finite. leaving: this rank was asked to stop. save_failed: it could
    not write its part of a checkpoint. seconds: its own work in this step, without waiting for other ranks.
    tokens, squares, trained: the `Load` of its packs, which all ranks of a data-parallel replica have alike.
    """

    bad_loss: bool
    leaving: bool
    save_failed: bool
    seconds: float
    tokens: float
    squares: float
    trained: float


def gather_statuses(own: RankStatus, topology: Topology) -> list[RankStatus]:
    """The status of every rank, in the order of ranks. All ranks must call this function."""
    sent = torch.tensor(astuple(own), dtype=torch.float64, device=topology.device)
    received = torch.empty(topology.world_size * len(sent), dtype=sent.dtype, device=topology.device)
    torch.distributed.all_gather_into_tensor(received, sent)
    rows = received.view(topology.world_size, -1).tolist()
    return [RankStatus(*map(bool, row[:3]), *row[3:]) for row in rows]
