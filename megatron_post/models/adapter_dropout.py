"""Dropout of adapters' inputs, which zeroes the same numbers in every layout.

Whether a number is kept is a hash of the microbatch's seed, the adapter, the token's index in the pack and
the column. A generator could not do this, because a rank would have to draw the whole pack's numbers.
"""

import zlib

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

# megatron-core's recomputation restores the tracker's states as they were in the forward pass. So a layer
# that is computed again finds the microbatch that it had, although others have run since.
_STATE = "adapter-dropout"


def begin_microbatch(state: Tensor) -> None:
    """Set the microbatch of the following forward passes. state: see `microbatch_state`."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), _STATE: state})


def microbatch_state(seed: int, tokens: Tensor) -> Tensor:
    """int32 [1 + t / cp], a seed of 31 bits and the indices in the pack of this rank's tokens."""
    return torch.cat((tokens.new_tensor([seed]), tokens)).to(torch.int32)


def tokens_of_microbatch() -> tuple[Tensor, Tensor]:
    """The seed [1] and the tokens [t / cp] of the microbatch that `begin_microbatch` has set."""
    state: Tensor = get_cuda_rng_tracker().get_states()[_STATE]
    return state[:1], state[1:]


def drop(x: Tensor, seed: Tensor, tokens: Tensor, *, adapter: str, first_column: int, share: float) -> Tensor:
    """Zero a share of the numbers of x [t, 1, h] and divide the others by 1 - share.

    seed: [1]. tokens: [t], the index of each token in its pack. adapter: the adapter's name in the model.
    first_column: the number of x's first column in the whole input.
    """
    columns = torch.arange(first_column, first_column + x.shape[-1], dtype=torch.int32, device=x.device)
    rows = _mixed(tokens ^ _mixed(seed ^ (zlib.crc32(adapter.encode()) >> 1)))
    values = _mixed(rows[:, None] ^ _mixed(columns + 1)[None])
    dropped = values < int(share * 2**32) - 2**31
    return (x / (1 - share)).masked_fill(dropped[:, None], 0.0)


def _mixed(x: Tensor) -> Tensor:
    """A hash of int32 to int32, whose multiplications wrap around (lowbias32 by C. Wellons)."""
    # `>>` repeats the sign, which the masks take away again.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
