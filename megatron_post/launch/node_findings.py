"""The reports of ranks when a job starts, and the findings in them. `node_check` collects the reports."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_post.launch.placement import Placement

CLOCK_SECONDS = 0.5
SLOW_COMPUTE = 1.5  # relative to the median node
SLOW_COLLECTIVE = 3.0  # relative to the median group
COLLECTIVE_FLOOR = 1e-3  # in seconds; a faster group is never reported as slow
LEFTOVER_MIB = 2000  # GPU memory in use before the ranks start
# the fields of nvidia-smi that `gpu_faults` parses
GPU_FIELDS = "index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,memory.used"


@dataclass(frozen=True)
class Arrival:
    """The first report of a rank. Its first rank reports for the whole node.

    gpu_faults: what nvidia-smi counts. unfit: packages in versions that do not fit.
    """

    rank: int
    host: str
    gpus: int
    gpu_faults: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The measurements of a rank. compute, collectives: the best time in seconds. clock: `time.time()`."""

    rank: int
    host: str
    clock: float
    compute: float
    collectives: dict[str, float] = field(default_factory=dict)
    wrong_sums: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """One line for the log. A fatal finding means that the run would fail."""

    text: str
    is_fatal: bool


def judge_arrivals(arrivals: list[Arrival], placement: Placement, *, waited: float) -> list[Finding]:
    """Find ranks that did not arrive within `waited` seconds, missing or faulty GPUs, and unfit packages.

    All of these findings are fatal.
    """
    found = []
    absent = sorted(set(range(placement.world_size)) - {arrival.rank for arrival in arrivals})
    if absent:
        numbers = sorted({placement.node(rank) for rank in absent})
        found.append(
            f"ranks {', '.join(map(str, absent[:16]))}{', ...' if len(absent) > 16 else ''} did not arrive "
            f"within {waited:.0f} s (node number {', '.join(map(str, numbers))} of the job, from 0)"
        )
    most = max(arrival.gpus for arrival in arrivals)
    for host, first in {arrival.host: arrival for arrival in reversed(arrivals)}.items():
        if most and first.gpus < placement.ranks_per_node:
            found.append(f"node {host} has {first.gpus} GPUs for {placement.ranks_per_node} ranks")
    found += [f"node {arrival.host}: {text}" for arrival in arrivals for text in arrival.gpu_faults]
    versions = [(text, arrival.host) for arrival in arrivals for text in arrival.unfit]
    for text in dict.fromkeys(text for text, _ in versions):  # one image is on all nodes
        hosts = [host for other, host in versions if other == text]
        found.append(f"node {hosts[0]}{f' and {len(hosts) - 1} more' if hosts[1:] else ''}: {text}")
    return [Finding(text, is_fatal=True) for text in found]


def judge(reports: list[Report], placement: Placement) -> list[Finding]:
    """Find wrong sums, slow nodes and slow groups. reports: one of each rank, in order of rank."""
    hosts = {report.rank: report.host for report in reports}
    found = [
        Finding(f"node {report.host}, rank {report.rank}: {text}", is_fatal=True)
        for report in reports
        for text in report.wrong_sums
    ]
    by_host = defaultdict(list)
    for report in reports:
        by_host[report.host].append(report.compute)
    slowest = {host: max(seconds) for host, seconds in by_host.items()}
    median = statistics.median(slowest.values())
    for host, seconds in slowest.items():
        if seconds > SLOW_COMPUTE * median:
            text = f"slow node {host}: a matrix product takes {seconds / median:.1f} times the median node's"
            found.append(Finding(text, is_fatal=False))
    for axis in placement.axes():
        times = {r.rank: r.collectives[axis] for r in reports if axis in r.collectives}
        if not times:
            continue
        median = statistics.median(times.values())
        for group in placement.groups(axis):
            seconds = max(times[rank] for rank in group)
            if seconds > max(SLOW_COLLECTIVE * median, COLLECTIVE_FLOOR):
                nodes = ", ".join(dict.fromkeys(hosts[rank] for rank in group))
                text = (
                    f"slow {axis} group on {nodes}: an all-reduce takes {1e3 * seconds:.1f} ms, the median "
                    f"{axis} group's {1e3 * median:.1f} ms"
                )
                found.append(Finding(text, is_fatal=False))
    return found


def judge_clocks(reports: list[Report], *, earliest: float, latest: Iterable[float]) -> list[Finding]:
    """Find nodes whose clock differs from rank 0's clock.

    By rank 0's clock each report was made after `earliest` and before its entry in `latest`. A clock outside
    that interval is wrong by at least the distance to it.
    """
    skews: dict[str, float] = {}
    for report, arrival in zip(reports, latest, strict=True):
        skew = min(report.clock - earliest, 0.0) or max(report.clock - arrival, 0.0)
        if abs(skew) > CLOCK_SECONDS:
            skews.setdefault(report.host, skew)
    return [
        Finding(f"node {host}: its clock is {skew:+.1f} s or more off rank 0's", is_fatal=False)
        for host, skew in skews.items()
    ]


def gpu_faults(csv: str) -> list[str]:
    """Find faults in nvidia-smi's output for `GPU_FIELDS`, which has one line per GPU."""
    found = []
    for line in csv.splitlines():
        index, errors, slowdown, used = (part.strip() for part in line.split(","))
        if errors.isdigit() and int(errors):
            found.append(f"GPU {index} has {errors} uncorrected memory errors: reset it or drain the node")
        if slowdown == "Active":
            found.append(f"GPU {index} is slowed down by its hardware (heat or power)")
        if used.isdigit() and int(used) > LEFTOVER_MIB:
            found.append(f"GPU {index} has {used} MiB in use already: another process still runs on it")
    return found
