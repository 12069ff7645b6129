"""Finds losses and gradients that are not finite before the weights change, and losses that jump."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from megatron_post.data.pack import Pack
from megatron_post.parallel.topology import Topology
from megatron_post.train.step_lines import StepLines

# An outlier is judged by the last WINDOW values, once there are at least FEWEST of them.
WINDOW, FEWEST = 100, 20


class NotFinite(FloatingPointError):
    """A loss or a gradient is NaN or infinite. The weights are unchanged. places: one line for each place."""

    def __init__(self, step: int, norm: float, places: Sequence[str]) -> None:
        self.places = list(places)
        lines = [f"step {step}: not finite (gradient norm {norm}), the optimizer has not moved", *places]
        super().__init__("\n  ".join(lines))


class Outliers:
    """Measures how far a value is from the median of the values before it, in robust standard deviations.

    For normal noise the median absolute deviation times 1.4826 is the standard deviation. Unlike the usual
    estimate, it hardly changes when the window contains an outlier.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)

    def score(self, value: float) -> float:
        """The score of a new value. It is positive above the median, and 0 while there are too few values."""
        score = 0.0
        if len(self._window) >= FEWEST:
            middle = median(self._window)
            spread = 1.4826 * median(abs(x - middle) for x in self._window)
            # A constant loss has no spread. The lower bound keeps rounding errors from being outliers.
            score = (value - middle) / max(spread, 1e-6 * abs(middle), 1e-12)
        self._window.append(value)
        return score


class Spikes:
    """Writes each step whose loss or gradient norm jumps to a file of JSON lines, with the step's samples.

    It runs on the last pipeline stage, once per data-parallel rank. These ranks see the same global values,
    so they take the same decision without communication. The reporting rank writes the line.
    """

    def __init__(
        self, lines: StepLines, topology: Topology, sources: Sequence[str], *, threshold: float
    ) -> None:
        self._lines, self._topology, self._sources = lines, topology, list(sources)
        self._threshold = threshold
        self._losses, self._norms = Outliers(), Outliers()

    def begin(self, *, after: int) -> None:
        """Continue the run after step `after`. Lines of later steps are removed."""
        if self._topology.is_reporter:
            self._lines.cut_back(after)

    def look(
        self, step: int, values: dict[str, float], packs: Sequence[Pack], losses: Sequence[float]
    ) -> dict[str, float]:
        """`loss_outlier` and `grad_norm_outlier` of a step. values: its metrics.

        losses: one for each pack.
        """
        scores = {
            "loss_outlier": self._losses.score(values["loss"]),
            "grad_norm_outlier": self._norms.score(values["grad_norm"]),
        }
        # The ranks of the group have equal scores, so all of them enter the collective below or none does.
        if max(scores.values()) > self._threshold:
            own = [
                {
                    "data_rank": self._topology.data_rank,
                    "microbatch": i,
                    "loss": loss,
                    "samples": samples_of(pack, self._sources),
                }
                for i, (pack, loss) in enumerate(zip(packs, losses, strict=True))
            ]
            parts: list[Any] = [None] * self._topology.data_size
            torch.distributed.all_gather_object(parts, own, group=self._topology.groups.dp)
            if self._topology.is_reporter:
                by_loss = sorted((entry for part in parts for entry in part), key=lambda e: -e["loss"])
                line = {"step": step, "loss": values["loss"], "grad_norm": values["grad_norm"], **scores}
                self._lines.write(**line, packs=by_loss)
        return scores


def not_finite(losses: Sequence[float]) -> list[int]:
    """The microbatches whose loss is NaN or infinite."""
    return [i for i, loss in enumerate(losses) if not math.isfinite(loss)]


def name_places(
    kind: str, microbatches: Sequence[int], packs: Sequence[Pack], topology: Topology, sources: Sequence[str]
) -> list[str]:
    """One line for each bad microbatch of any rank. All ranks must call this function and get all lines."""
    own = [
        f"rank {topology.rank}, microbatch {i}: {kind}; samples {', '.join(samples_of(packs[i], sources))}"
        for i in microbatches
    ]
    parts: list[Any] = [None] * topology.world_size
    torch.distributed.all_gather_object(parts, own)
    return [line for part in parts for line in part]


def samples_of(pack: Pack, sources: Sequence[str]) -> list[str]:
    """The samples in a pack as "source:row", in order and without repetition."""
    pairs = zip(pack.sources.tolist(), pack.sample_ids.tolist(), strict=True)
    names = dict(enumerate(sources))
    return list(
        dict.fromkeys(f"{names.get(source, source)}:{sample}" for source, sample in pairs if source >= 0)
    )
