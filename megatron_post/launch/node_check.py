"""Check that all nodes of a job are present, healthy and equally fast, before megatron-core is imported.

Every rank runs this check when a job starts. Ranks report through a key-value store on rank 0. A global
process group with thousands of ranks would cost more than the check.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_post.config.sections import Parallel
from megatron_post.display import say
from megatron_post.installation import installed_versions, unfit_versions
from megatron_post.launch.node_findings import (
    GPU_FIELDS,
    Arrival,
    Finding,
    Report,
    gpu_faults,
    judge,
    judge_arrivals,
    judge_clocks,
)
from megatron_post.launch.placement import Placement, place
from megatron_post.parallel.environment import rank_from_environment

ARRIVAL_SECONDS = 180.0


def check_nodes(parallel: Parallel) -> bool:
    """Run the check on all ranks; rank 0 prints every finding. Returns whether the run may start."""
    rank, world_size, local_rank = rank_from_environment()
    if world_size == 1 or world_size % parallel.model_size:
        return True  # the run itself reports what is wrong with its layout
    ranks_per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    nodes, rest = divmod(world_size, ranks_per_node)
    assert not rest, "nodes of equal numbers of ranks"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        # This is longer than rank 0 waits for the last rank. Otherwise the other ranks would time out before
        # rank 0 can name the absent one.
        timeout=timedelta(seconds=2 * ARRIVAL_SECONDS),
        wait_for_workers=False,
    )
    placement = place(parallel, nodes=nodes, ranks_per_node=ranks_per_node)
    arrival = _arrive(rank, local_rank)
    store.set(f"arrival/{rank}", json.dumps(asdict(arrival)))
    found: list[Finding] = []
    absent: list[int] = []
    may_start: bool | None = None
    if rank == 0:
        # A collective would hang if a rank were absent or had no GPU, so rank 0 decides about those first.
        absent = _absent(store, world_size)
        present = sorted({*range(world_size)} - {*absent})
        arrivals = [Arrival(**_read(store, f"arrival/{number}")) for number in present]
        found += judge_arrivals(arrivals, placement, waited=ARRIVAL_SECONDS)
        may_start = not any(finding.is_fatal for finding in found)
        released = time.time()
        if not may_start:
            _print(found)
    if not _agree(store, "go", may_start, others=world_size - 1 - len(absent)):
        return False
    report = _measure(placement, store, arrival, local_rank)
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    if rank == 0:
        reports, received = [], []
        for other in range(world_size):
            reports.append(Report(**_read(store, f"report/{other}")))
            received.append(time.time())
        found += [*judge(reports, placement), *judge_clocks(reports, earliest=released, latest=received)]
        _print(found)
        may_start = not any(finding.is_fatal for finding in found)
    verdict = _agree(store, "verdict", may_start, others=world_size - 1)
    dist.destroy_process_group()
    return verdict


def _arrive(rank: int, local_rank: int) -> Arrival:
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank > 0:
        return Arrival(rank, host, gpus)
    nccl = {"NCCL": ".".join(map(str, torch.cuda.nccl.version()))} if gpus else {}
    unfit = unfit_versions({**installed_versions(), **nccl})
    return Arrival(rank, host, gpus, _nvidia_smi() if gpus else [], unfit)


def _measure(placement: Placement, store: dist.Store, arrival: Arrival, local_rank: int) -> Report:
    clock = time.time()
    device = torch.device("cuda", local_rank) if arrival.gpus else torch.device("cpu")
    compute = _best_time(_matrix_product(device), device)
    collectives, wrong = _collectives(placement, store, device=device, rank=arrival.rank)
    return Report(arrival.rank, arrival.host, clock, compute, collectives, wrong)


def _collectives(
    placement: Placement, store: dist.Store, *, device: torch.device, rank: int
) -> tuple[dict[str, float], list[str]]:
    """Seconds of an all-reduce in this rank's group along each axis, and the groups with wrong sums."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Without a device_id NCCL builds a communicator at its first use. The global one is never used, so it
    # costs nothing.
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("check", store),
        rank=rank,
        world_size=placement.world_size,
        timeout=timedelta(seconds=ARRIVAL_SECONDS),
    )
    seconds: dict[str, float] = {}
    wrong = []
    for axis, (size, _) in placement.axes().items():
        if size == 1:
            continue
        ranks = placement.group(axis, rank)
        group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
        # Sums of ranks are whole numbers, which fp64 represents exactly. The comparison needs no tolerance.
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
    """Seconds of the fastest of `tries` calls, after one call to warm up."""
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
    """Return rank 0's answer on all ranks. `answer` is None on the other ranks.

    The store ends with the process of rank 0, so rank 0 waits until `others` ranks have read the answer.
    """
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
        absent = [rank for rank in absent if not store.check([f"arrival/{rank}"])]
        if absent:
            time.sleep(0.2)
    return absent


def _read(store: dist.Store, key: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(store.get(key))
    return value


def _print(found: list[Finding]) -> None:
    for finding in found:
        say(f"node check: {'FAULT' if finding.is_fatal else 'warning'}: {finding.text}")
    say(f"node check: {len(found)} finding(s)")
