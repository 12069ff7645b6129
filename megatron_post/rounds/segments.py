"""Computes values of segments with a model on these ranks. `score` and `evaluate choices` use it."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_post.config.layout import segment_multiple
from megatron_post.config.load import ConfigError
from megatron_post.config.schema import Config
from megatron_post.data.batch import PackedBatch
from megatron_post.data.pack import Pack, pack_of_segments
from megatron_post.data.packing import pack_units
from megatron_post.data.template import Rendered
from megatron_post.data.units import round_up
from megatron_post.parallel.topology import Topology
from megatron_post.train.step import Stepper

# The rows of a batch, for each pipeline stage of each data-parallel rank.
_ROWS_AT_ONCE = 256


def refuse_interleaved(config: Config) -> None:
    """Raise `ConfigError` for an interleaved schedule, which needs several packs at a time."""
    if config.parallel.virtual_pipeline > 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={config.parallel.virtual_pipeline}: packs are scored one by one, and "
            "the interleaved schedule needs several at a time; leave it at 1"
        )


def rows_at_once(config: Config, topology: Topology) -> int:
    """The number of rows of a batch that keeps all ranks busy."""
    return _ROWS_AT_ONCE * config.parallel.pipeline * topology.data_size


def values_of_segments(
    segments: Sequence[Rendered],
    values_of: Callable[[Tensor, PackedBatch], Tensor],
    *,
    copies: int,
    rows: str,
    stepper: Stepper,
    topology: Topology,
    config: Config,
    pad_id: int,
    places: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """The values of segments, float64 [values], the same on all ranks. All ranks must call it.

    values_of: makes the values [n] of a pack's n segments of the model's output and this rank's part of the
    pack. There is one value for each segment. places: makes it one value for each of these tokens of a
    segment, int64, counted from its first token. `values_of` then makes the values [t] of the pack's tokens.
    copies: the number of ranks of a pack that have the same value, by whose sum the result is divided. rows:
    names the rows of the segments in a message.

    Raises `ValueError` for a segment that is longer than a pack.
    """
    counts = np.ones(len(segments), dtype=np.int64) if places is None else np.array([*map(len, places)])
    ends = np.cumsum(counts)
    found = np.zeros(int(ends[-1]))
    own = slice(topology.data_rank, None, topology.data_size)
    # With twice as many packs as stages, a stage is idle for at most a third of the time.
    at_once = 2 * config.parallel.pipeline if config.parallel.pipeline > 1 else 1
    share = at_once * topology.data_size
    for members, packs in _packs(segments, config, rows=rows, pad_id=pad_id, share=share):
        # Each data-parallel rank scores its own packs, and some ranks may have none.
        outputs = stepper.outputs(packs[own]) if packs[own] else []
        for index, pack, (output, part) in zip(members[own], packs[own], outputs, strict=False):
            values = values_of(output, part).double().cpu().numpy()
            for number, segment in enumerate(index):
                start = pack.cu_seqlens[number]
                taken = [number] if places is None else start + places[segment]
                found[ends[segment] - counts[segment] : ends[segment]] = values[taken]
    total = torch.from_numpy(found).to(topology.device)
    # Only the last pipeline stage fills `found`.
    torch.distributed.all_reduce(total)
    return (total / copies).cpu().numpy()


def _packs(
    segments: Sequence[Rendered], config: Config, *, rows: str, pad_id: int, share: int
) -> Iterator[tuple[list[np.ndarray], list[Pack]]]:
    """Yield the packs of the segments, `share` at a time, with the indices of the segments in each."""
    multiple, capacity = segment_multiple(config), config.data.pack_length
    lengths = np.array([round_up(len(segment), multiple) for segment in segments])
    if lengths.max() > capacity:
        raise ValueError(
            f"a response among {rows} has {lengths.max()} tokens "
            f"with its prompt, and data.pack_length is {capacity}; "
            f"give data.pack_length={round_up(int(lengths.max()), 128)}"
        )
    members = pack_units(lengths, capacity=capacity)
    for start in range(0, len(members), share):
        group = members[start : start + share]
        yield (
            group,
            [
                pack_of_segments(
                    [segments[i] for i in member],
                    pack_length=capacity,
                    segment_multiple=multiple,
                    pad_id=pad_id,
                )
                for member in group
            ],
        )
