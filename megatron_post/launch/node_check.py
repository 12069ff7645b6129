"""At job start, on every rank, before megatron-core is imported: are all nodes there, healthy, of one speed?

Ranks report through a key-value store on rank 0 and not through a global process group, which at thousands of
ranks would cost more than the check.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from megatron_post.config.schema import Parallel
from megatron_post.launch.placement import Placement, place
from megatron_post.parallel.environment import rank_from_environment

ARRIVAL_SECONDS = 180.0
CLOCK_SECONDS = 0.5
SLOW_COMPUTE = 1.5  # times the median node
SLOW_COLLECTIVE = 3.0  # times the median group
COLLECTIVE_FLOOR = 1e-3  # seconds below which no group is called slow
LEFTOVER_MIB = 2000  # GPU memory in use before the ranks start


@dataclass(frozen=True)
class Report:
    """What a rank has found. compute, collectives: seconds, the best of some tries; clock: time.time()."""

    rank: int
    host: str
    clock: float
    gpus: int
    gpu_faults: list[str]
    compute: float
    collectives: dict[str, float] = field(default_factory=dict)
    wrong_sums: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """One line for the log. A fatal one means that the run would fail."""

    text: str
    is_fatal: bool


def check_nodes(parallel: Parallel) -> bool:
    """Run the check on all ranks; rank 0 prints every finding. Returns whether the run may start."""
    rank, world_size, local_rank = rank_from_environment()
    if world_size == 1:
        return True
    ranks_per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    nodes, rest = divmod(world_size, ranks_per_node)
    assert not rest, "nodes of equal numbers of ranks"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        timeout=timedelta(seconds=ARRIVAL_SECONDS),
        wait_for_workers=False,
    )
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    store.set(f"host/{rank}", host)
    if rank == 0 and (absent := _absent(store, world_size)):
        _print([Finding(_name_absent(absent, ranks_per_node), is_fatal=True)])
        _agree(store, "go", False, others=world_size - 1 - len(absent))
        return False
    released = time.time()
    if not _agree(store, "go", True if rank == 0 else None, others=world_size - 1):
        return False
    report = _examine(parallel, store, host=host, rank=rank, local_rank=local_rank, nodes=nodes)
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    may_start = None
    if rank == 0:
        reports, arrivals = [], []
        for other in range(world_size):
            reports.append(Report(**json.loads(store.get(f"report/{other}"))))
            arrivals.append(time.time())
        placement = place(parallel, nodes=nodes, ranks_per_node=ranks_per_node)
        found = [*judge(reports, placement), *judge_clocks(reports, earliest=released, latest=arrivals)]
        _print(found)
        may_start = not any(finding.is_fatal for finding in found)
    verdict = _agree(store, "verdict", may_start, others=world_size - 1)
    dist.destroy_process_group()
    return verdict


def judge(reports: list[Report], placement: Placement) -> list[Finding]:
    """Findings from all ranks' reports, by rank: GPUs, wrong sums, slow nodes, slow groups."""
    found = []
    hosts = {report.rank: report.host for report in reports}
    most = max(report.gpus for report in reports)
    seen: set[str] = set()
    for report in reports:
        if report.host not in seen:
            seen.add(report.host)
            if most and report.gpus < placement.ranks_per_node:
                text = f"node {report.host} has {report.gpus} GPUs for {placement.ranks_per_node} ranks"
                found.append(Finding(text, is_fatal=True))
            found += [Finding(f"node {report.host}: {text}", is_fatal=True) for text in report.gpu_faults]
        found += [
            Finding(f"node {report.host}, rank {report.rank}: {text}", is_fatal=True)
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
    """Nodes whose clock reads what it cannot have read, by rank 0's clock: each report was made after
    `earliest` and before its entry of `latest`."""
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
    """Faults in nvidia-smi's answer to `GPU_FIELDS`, one line a GPU."""
    found = []
    for line in csv.splitlines():
        index, errors, slowdown, used = (part.strip() for part in line.split(","))
        if errors.isdigit() and int(errors):
            found.append(f"GPU {index} has {errors} uncorrected memory errors: reset it or drain the node")
        if slowdown == "Active":
            found.append(f"GPU {index} is slowed down by its hardware (heat or power)")
        if used.isdigit() and int(used) > LEFTOVER_MIB:
            found.append(f"GPU {index} has {used} MiB in use already: another process is still on it")
    return found


GPU_FIELDS = "index,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown,memory.used"


def _examine(
    parallel: Parallel, store: dist.Store, *, host: str, rank: int, local_rank: int, nodes: int
) -> Report:
    clock = time.time()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local_rank) if gpus > local_rank else torch.device("cpu")
    faults = _nvidia_smi() if local_rank == 0 and gpus else []
    if gpus and device.type == "cpu":
        return Report(rank, host, clock, gpus, faults, compute=0.0)
    compute = _best_time(_matrix_product(device), device)
    collectives, wrong = _collectives(parallel, store, device=device, rank=rank, nodes=nodes)
    return Report(rank, host, clock, gpus, faults, compute, collectives, wrong)


def _collectives(
    parallel: Parallel, store: dist.Store, *, device: torch.device, rank: int, nodes: int
) -> tuple[dict[str, float], list[str]]:
    """Seconds of an all-reduce in this rank's group along each axis, and the axes where its sum is wrong."""
    _, world_size, _ = rank_from_environment()
    placement = place(parallel, nodes=nodes, ranks_per_node=world_size // nodes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # without a device_id NCCL builds communicators when they are used: the global one never is
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("check", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=ARRIVAL_SECONDS),
    )
    seconds: dict[str, float] = {}
    wrong = []
    for axis, (size, _) in placement.axes().items():
        if size == 1:
            continue
        ranks = placement.group(axis, rank)
        group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
        # sums of ranks are whole numbers, which fp64 holds exactly
        values = torch.full((1 << (20 if device.type == "cuda" else 14),), float(rank), dtype=torch.float64)
        values = values.to(device)
        dist.all_reduce(values, group=group)
        if not bool((values == float(sum(ranks))).all()):
            wrong.append(f"the all-reduce of its {axis} group is wrong: a broken GPU or link")
        values.zero_()
        seconds[axis] = _best_time(partial(dist.all_reduce, values, group=group), device)
    return seconds, wrong


def _matrix_product(device: torch.device) -> Callable[[], object]:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    left = torch.ones(size, size, dtype=dtype, device=device)
    return lambda: left @ left


def _best_time(function: Callable[[], object], device: torch.device, *, tries: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    best = float("inf")
    for attempt in range(tries + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - started)
    return best


def _nvidia_smi() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        return gpu_faults(
            subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        )
    except (subprocess.SubprocessError, ValueError) as error:
        return [f"nvidia-smi fails: {error}"]


def _agree(store: dist.Store, question: str, answer: bool | None, *, others: int) -> bool:
    """Rank 0's answer, on all ranks. Rank 0 stays until the others have read it: the store dies with it."""
    if answer is None:
        answer = store.get(question) == b"yes"
        store.add(f"{question}/read", 1)
        return answer
    store.set(question, "yes" if answer else "no")
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while store.add(f"{question}/read", 0) < others and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


def _absent(store: dist.Store, world_size: int) -> list[int]:
    """Ranks that have not reported within `ARRIVAL_SECONDS`."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    absent = list(range(world_size))
    while absent and time.monotonic() < deadline:
        absent = [rank for rank in absent if not store.check([f"host/{rank}"])]
        if absent:
            time.sleep(0.2)
    return absent


def _name_absent(ranks: list[int], ranks_per_node: int) -> str:
    numbers = sorted({rank // ranks_per_node for rank in ranks})
    return (
        f"ranks {', '.join(map(str, ranks[:16]))}{', ...' if len(ranks) > 16 else ''} did not arrive within "
        f"{ARRIVAL_SECONDS:.0f} s (node number {', '.join(map(str, numbers))} of the job, from 0)"
    )


def _print(found: list[Finding]) -> None:
    for finding in found:
        print(f"node check: {'FAULT' if finding.is_fatal else 'warning'}: {finding.text}", flush=True)
    print(f"node check: {len(found)} finding(s)", flush=True)
