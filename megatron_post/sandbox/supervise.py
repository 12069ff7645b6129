"""Watches one running program, reads its output, and kills it at its limits."""

import os
import selectors
import subprocess
import time
from collections.abc import Iterable
from threading import Event
from typing import Protocol

from megatron_post.sandbox import processes
from megatron_post.sandbox.kernel_limits import MIB
from megatron_post.sandbox.outcome import Kind, Outcome, kind_of
from megatron_post.sandbox.settings import Limits

SECONDS_TO_END = 30.0  # that a killed process may take to end
_FIRST_LOOK, _LOOKS = 0.002, 0.025  # seconds until the first check of a program, and between later ones
_AGAIN = 0.01  # seconds until memory is measured a second time
_CHUNK = 2**16


class BrokenSandbox(RuntimeError):
    """The sandbox itself failed, and not the program in it."""


class Program(Protocol):
    """A program that has been started in a sandbox of some kind."""

    process: subprocess.Popen[bytes]  # the sandbox. Its standard output and error are the program's
    root: int | None  # the program and all that it starts are descendants of this process

    def disk_bytes(self) -> int:
        """Bytes of the files that the program has written."""

    def kill(self) -> None:
        """Kill the program and all processes that it started. They may have ended already."""

    def finish(self, *, killed: bool) -> None:
        """Wait until no process of the program is left. Raises `BrokenSandbox` if it was never started."""


def supervise(program: Program, limits: Limits, cancelled: Event) -> Outcome:
    """Watch a program until it ends. No process of it is left when this returns. `cancelled` kills it.

    Raises `BrokenSandbox` with the output of the sandbox if the sandbox fails.
    """
    begun = time.monotonic()
    printed = {"stdout": bytearray(), "stderr": bytearray()}
    exceeded: Kind | None = None
    finished = False
    try:
        exceeded = _watch(program, limits, cancelled, printed, begun)
        finished = exceeded is None and not cancelled.is_set()
        seconds = time.monotonic() - begun
    finally:
        if not finished:
            program.kill()
        returncode = _ended(program.process)
        for stream in (program.process.stdout, program.process.stderr):
            assert stream is not None
            stream.close()
    stdout, stderr = (bytes(text).decode(errors="replace") for text in printed.values())
    try:
        program.finish(killed=not finished)
    except BrokenSandbox as error:
        reason = " ".join(stderr.split())[-500:] or f"exit status {returncode}"
        raise BrokenSandbox(f"{error}: {reason}") from None
    if exceeded is None and finished and program.disk_bytes() >= limits.disk_mib * MIB:
        exceeded = "disk"  # the disk was full, and the program ended by itself before the next check
    return Outcome(exceeded or kind_of(returncode), returncode, stdout, stderr, round(seconds, 3))


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit status in a shell's form, which is 128 + n for signal n."""
    try:
        status = process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        raise BrokenSandbox(f"process {process.pid} of a sandbox does not end") from None
    return status if status >= 0 else 128 - status


def _watch(
    program: Program, limits: Limits, cancelled: Event, printed: dict[str, bytearray], begun: float
) -> Kind | None:
    """Read the output until the program ends. Returns the limit that it exceeds, or None."""
    room = limits.output_kib * 2**10
    wait, next_look = _FIRST_LOOK, begun + _FIRST_LOOK
    with selectors.DefaultSelector() as streams:
        for name in printed:
            streams.register(getattr(program.process, name), selectors.EVENT_READ, printed[name])
        while streams.get_map() or program.process.poll() is None:
            # A program may close its streams and keep running. Then `select` only waits for the time.
            for key, _ in streams.select(max(0.0, next_look - time.monotonic())):
                chunk = os.read(key.fd, min(_CHUNK, room + 1))
                key.data.extend(chunk[:room])
                if len(chunk) > room:
                    return "output"
                room -= len(chunk)
                if not chunk:
                    streams.unregister(key.fileobj)
            if time.monotonic() >= next_look:
                if cancelled.is_set():
                    return None
                if kind := _look(program, limits, begun):
                    return kind
                wait = min(2 * wait, _LOOKS)
                next_look = time.monotonic() + wait
    return None


def _look(program: Program, limits: Limits, begun: float) -> Kind | None:
    """The limit that a program exceeds now, or None."""
    if time.monotonic() - begun > limits.seconds:
        return "timeout"
    if program.root is None:
        return None
    found = processes.descendants(program.root)
    if sum(found.values()) > limits.processes:
        return "processes"
    if processes.cpu_seconds([program.root, *found]) > limits.cpu_seconds:
        return "timeout"
    if processes.open_files(found) > 4 * limits.open_files:
        return "files"  # memory of sockets is not counted for any process
    if _too_much_memory(found, limits):
        time.sleep(_AGAIN)  # between fork and exec, a child counts its parent's memory too
        if _too_much_memory(found, limits):
            return "memory"
    return "disk" if program.disk_bytes() >= limits.disk_mib * MIB else None


def _too_much_memory(found: Iterable[int], limits: Limits) -> bool:
    most = limits.memory_mib * MIB
    return processes.memory(found) > most and processes.shared_memory(found) > most
