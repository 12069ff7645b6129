"""Compares runs of one benchmark: which figures changed, and which settings and environment differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_post.bench.record import Figure, Record, changed

# These are different in every run.
_ALWAYS = ("date", "load")


@dataclass(frozen=True)
class Verdict:
    """A figure compared with an earlier run. ratio: the later median divided by the earlier median."""

    ratio: float
    kind: Literal["better", "worse", "changed", "no change seen", "measured once"]

    def __str__(self) -> str:
        return f"{self.ratio - 1:+.1%}: {self.kind}"


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each benchmark and subject, oldest first."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.benchmark, record.subject), []).append(record)
    return list(found.values())


def compare(before: Record, after: Record) -> dict[str, Verdict]:
    """The verdict on each figure that both records have.

    A figure counts as changed only if the intervals of the two medians do not overlap. Then the runs differ
    by more than their own samples do. The verdict does not say why: see `differences`.
    """
    return {
        name: _verdict(before.figures[name], figure)
        for name, figure in after.figures.items()
        if name in before.figures and before.figures[name].median
    }


def differences(before: Record, after: Record) -> list[str]:
    """Settings and environment that differ, such as "torch: 2.12 -> 2.13"."""
    settings = _differences(before.settings, after.settings)
    return settings + _differences(before.environment, after.environment)


def summary(records: Sequence[Record]) -> list[str]:
    """A line for each benchmark that was run more than once.

    It says what changed between the first run and the last run, and which settings differ.
    """
    lines = []
    for runs in groups(records):
        if len(runs) < 2:
            continue
        changes = [
            f"{name} {verdict}"
            for name, verdict in compare(runs[0], runs[-1]).items()
            if verdict.kind in ("better", "worse", "changed")
        ]
        text = "; ".join(changes) or "no change seen"
        if others := _differences(runs[0].settings, runs[-1].settings):
            text += f" (other settings: {'; '.join(others)})"
        lines.append(f"{runs[0].benchmark} ({runs[0].subject}), {len(runs)} runs: {text}")
    return lines


def _differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: {one.get(name, '-')} -> {other.get(name, '-')}"
        for name in {**one, **other}
        if name not in _ALWAYS and one.get(name) != other.get(name)
    ]


def _verdict(before: Figure, after: Figure) -> Verdict:
    ratio = after.median / before.median
    if min(len(before.samples), len(after.samples)) < 2:
        return Verdict(ratio, "measured once")
    if not changed(before, after):
        return Verdict(ratio, "no change seen")
    if after.better is None:
        return Verdict(ratio, "changed")
    return Verdict(ratio, "better" if (ratio < 1) == (after.better == "lower") else "worse")
