"""What every rank says to all others once a step, before the optimizer moves: one small collective."""

from dataclasses import astuple, dataclass

import torch

from megatron_post.parallel.topology import Topology


@dataclass(frozen=True)
class Word:
    """bad_loss: a loss of this rank is not finite; leaving: it was asked to stop; save_failed: it could not
    save; seconds: its own work of the step, without waiting for others."""

    bad_loss: bool
    leaving: bool
    save_failed: bool
    seconds: float


def roll_call(own: Word, topology: Topology) -> list[Word]:
    """All ranks' words by rank. So all of them take the same decision at the same step."""
    said = torch.tensor(astuple(own), dtype=torch.float64, device=topology.device)
    heard = torch.empty(topology.world_size * len(said), dtype=said.dtype, device=topology.device)
    torch.distributed.all_gather_into_tensor(heard, said)
    rows = heard.view(topology.world_size, -1).tolist()
    return [Word(bool(bad), bool(leaving), bool(failed), seconds) for bad, leaving, failed, seconds in rows]
