"""Measures how evenly the packs of a step are spread over data-parallel ranks and over microbatches.

Ranks are compared in plain order and balanced, and with a floor that no assignment can beat. Packs are
compared with a floor that no packing can beat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.table import Table

from megatron_post.bench.synthetic import long_tailed_lengths
from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.data.balance import deal
from megatron_post.data.pack import tail_lengths
from megatron_post.data.packing import pack_units
from megatron_post.data.permutation import permutation
from megatron_post.plan.activations import Segment
from megatron_post.plan.flops import Load, step_flops
from megatron_post.plan.hardware import gpu
from megatron_post.plan.step import step_time
from megatron_post.plan.timing import Costs

BATCHES = 20  # global batches for each row of the table, or fewer if there are not enough packs
SIMULATED_RANKS, SIMULATED_BATCHES = 8, 3

# Mean tokens from tables 7 and 6 of "The Llama 3 Herd of Models". The first is of a dialog of general
# English. The others are of a preference: the tokens before the response, and the response. Lengths are
# log-normal with sigma 1.
CHAT_MEAN, CONTEXT_MEAN, RESPONSE_MEAN = 974.0, 1041.6 - 284.0, 284.0

_LAYOUTS: dict[str, dict[str, Any]] = {
    "llama3.1_8b": {"parallel": {"tensor": 2, "sequence": True, "context": 1}},
    "llama3.1_405b": {
        "parallel": {
            "tensor": 8,
            "sequence": True,
            "pipeline": 8,
            "virtual_pipeline": 8,
            "embedding_and_loss_as_layers": True,
            "context": 8,
        },
        "precision": {"fp8": "tensorwise"},
        "recompute": {"mode": "full"},
    },
}


@dataclass(frozen=True)
class Examples:
    """Units in packs of `pack_length`. segments: int64 [units, segments of each], tokens."""

    name: str
    preset: str
    pack_length: int
    segments: np.ndarray

    @cached_property
    def unit_squares(self) -> np.ndarray:
        """int64 [units], sums of length^2."""
        return (self.segments**2).sum(axis=1)

    @cached_property
    def packs(self) -> list[np.ndarray]:
        """Units of each pack, in an order drawn from the seed, as `data pack` writes them."""
        packs = pack_units(self.segments.sum(axis=1), capacity=self.pack_length)
        return [packs[i] for i in permutation(len(packs), 0, "balance")]

    @cached_property
    def squares(self) -> np.ndarray:
        """int64 [packs], sums of length^2. The padding at the end of a pack counts as short segments."""
        room = [self.pack_length - int(self.segments[units].sum()) for units in self.packs]
        tails = [sum(length**2 for length in tail_lengths(tail, 1)) for tail in room]
        return np.array([self.unit_squares[units].sum() for units in self.packs]) + np.array(tails)

    @cached_property
    def costliest_units(self) -> np.ndarray:
        """int64 [packs], the squares of each pack's costliest unit."""
        return np.array([self.unit_squares[units].max() for units in self.packs])

    def config(self, global_batch: int) -> Config:
        """The config of a run on these packs."""
        return validate(
            {
                "run_dir": "unused",
                "model": {"preset": self.preset},
                "tokenizer": {"path": "unused"},
                "data": {"store": "unused", "pack_length": self.pack_length},
                "train": {"steps": 1, "global_batch": global_batch},
                **_LAYOUTS[self.preset],
            },
            origin=self.name,
        )


@dataclass(frozen=True)
class Evenness:
    """Largest cost divided by the mean cost, in each of some global batches, float64 [batches].

    plain, balanced: of data-parallel ranks. rank_floor: the rank with the costliest pack has as many packs as
    every other rank, and its other packs cost at least as much as the cheapest of the batch. microbatches: of
    packs. microbatch_floor: the pack with the costliest unit holds that unit and a full pack of tokens,
    however the rest is packed.
    """

    ranks: int
    packs_per_rank: int
    plain: np.ndarray
    balanced: np.ndarray
    rank_floor: np.ndarray
    microbatches: np.ndarray
    microbatch_floor: np.ndarray


def examples(count: int = 200_000) -> list[Examples]:
    """The three distributions: dialogs, pairs, and dialogs of up to 128K for two models.

    Dialogs and pairs that are longer than a pack of 8,192 are dropped. count: units. The long distribution
    has five times as many, because its packs hold more.
    """
    draw = np.random.default_rng(0)
    chat = _log_normal(draw, CHAT_MEAN, count)[:, None]
    context = _log_normal(draw, CONTEXT_MEAN, count)
    pairs = np.stack([context + _log_normal(draw, RESPONSE_MEAN, count) for _ in range(2)], axis=1)
    long = long_tailed_lengths(5 * count, capacity=131072)[:, None]
    return [
        Examples("short chat, 8B, 8K", "llama3.1_8b", 8192, chat[chat[:, 0] <= 8192]),
        Examples("DPO pairs, 8B, 8K", "llama3.1_8b", 8192, pairs[pairs.sum(axis=1) <= 8192]),
        Examples("long tail, 8B, 128K", "llama3.1_8b", 131072, long),
        Examples("long tail, 405B, 128K", "llama3.1_405b", 131072, long),
    ]


def evenness(found: Examples, *, ranks: int, packs_per_rank: int) -> Evenness:
    """The evenness of global batches of `ranks` x `packs_per_rank` packs.

    The cost of a pack is the FLOPs of its tokens plus the FLOPs of its squares.
    """
    config = found.config(ranks * packs_per_rank)
    tokens = step_flops(config, Load(found.pack_length, 0, found.pack_length)).model
    square = step_flops(config, Load(0, 1, 0)).model
    rows = []
    for batch in _batches(found, ranks * packs_per_rank):
        costs = tokens + square * found.squares[batch]
        mean, ascending = costs.mean(), np.sort(costs)
        balanced = costs[deal(found.squares[batch], ranks=ranks)].sum(axis=1)
        least = ascending[-1] + ascending[: packs_per_rank - 1].sum()
        costliest_unit = tokens + square * found.costliest_units[batch].max()
        rows.append(
            (
                costs.reshape(packs_per_rank, ranks).sum(axis=0).max() / packs_per_rank / mean,
                balanced.max() / packs_per_rank / mean,
                max(1.0, least / packs_per_rank / mean),
                costs.max() / mean,
                max(1.0, costliest_unit / mean),
            )
        )
    return Evenness(ranks, packs_per_rank, *np.array(rows).T)


def step_seconds(found: Examples, *, ranks: int, packs_per_rank: int) -> tuple[float, float]:
    """Seconds of a step on H100s as the planner predicts them: in plain order, and balanced.

    The slowest rank's pipeline is simulated pack by pack. The result is the mean over a few global batches.
    """
    config = found.config(ranks * packs_per_rank)
    costs = Costs(config, gpu("h100-80gb"), ranks)

    def slowest(dealt: np.ndarray) -> float:
        return max(step_time(costs, [_segments(found, pack) for pack in packs]).seconds for packs in dealt)

    batches = _batches(found, ranks * packs_per_rank)[:SIMULATED_BATCHES]
    plain = [slowest(batch.reshape(packs_per_rank, ranks).T) for batch in batches]
    balanced = [slowest(batch[deal(found.squares[batch], ranks=ranks)]) for batch in batches]
    return float(np.mean(plain)), float(np.mean(balanced))


def balance_table(
    *, sizes: Sequence[tuple[int, int]] = ((2, 8), (2, 32), (8, 8), (8, 32), (64, 8), (64, 32))
) -> Table:
    """A table of the largest cost divided by the mean, and of a step's simulated seconds.

    Costs are of data-parallel ranks and of microbatches, as means over global batches. sizes: (ranks, packs
    per rank).
    """
    table = Table(
        title="largest cost / mean: of DP ranks in plain order, balanced, and the lowest possible; "
        "of packs, and the lowest possible; seconds of a step",
        box=None,
    )
    table.add_column("DP ranks x packs", no_wrap=True)
    for heading in ("plain", "balanced", "floor", "pack", "floor", "plain s", "bal. s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in examples():
        table.add_row(found.name, style="bold")
        for ranks, packs_per_rank in sizes:
            even = evenness(found, ranks=ranks, packs_per_rank=packs_per_rank)
            figures = (
                even.plain,
                even.balanced,
                even.rank_floor,
                even.microbatches,
                even.microbatch_floor,
            )
            seconds = (
                step_seconds(found, ranks=ranks, packs_per_rank=packs_per_rank)
                if ranks <= SIMULATED_RANKS
                else ()
            )
            table.add_row(
                f"  {ranks} x {packs_per_rank}",
                *(f"{values.mean():.3f}" for values in figures),
                *(f"{value:.2f}" for value in seconds),
            )
    return table


def _log_normal(draw: np.random.Generator, mean: float, count: int) -> np.ndarray:
    return np.maximum(draw.lognormal(np.log(mean) - 0.5, 1.0, count), 8).astype(np.int64)


def _batches(found: Examples, size: int) -> list[np.ndarray]:
    """The first global batches as indices of packs, int64 [size] each."""
    number = min(BATCHES, len(found.packs) // size)
    return list(np.arange(number * size).reshape(number, size))


def _segments(found: Examples, pack: int) -> tuple[Segment, ...]:
    lengths = found.segments[found.packs[pack]].ravel().tolist()
    tail = found.pack_length - sum(lengths)
    return tuple(Segment(length) for length in (*lengths, *tail_lengths(tail, 1)))
