"""Runs a megatron-post command in processes of its own, under torchrun if it needs several ranks."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

_LOG_TAIL = 30


def run_on_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    log: Path,
    console: Console,
    shown: tuple[str, ...],
    inherited: Sequence[int] = (),
) -> None:
    """Run the command `megatron-post COMMAND` on `ranks` ranks.

    All output of the ranks is written to `log`, and lines that start with one of `shown` are also printed.
    inherited: file descriptors that stay open in the process. Raises `ValueError` with the end of the log if
    the command fails.
    """
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [*launcher, "-m", "megatron_post", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=inherited,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(shown):
                console.print(line.rstrip(), highlight=False, soft_wrap=True)
    if process.returncode:
        lines = log.read_text().splitlines(keepends=True)
        # The log of several ranks ends with a long report of torchrun, so show the first error of a rank too.
        reason = [line for line in lines[:-_LOG_TAIL] if line.startswith("megatron-post: ")][:1]
        tail = "".join([*reason, *lines[-_LOG_TAIL:]])
        raise ValueError(
            f"`megatron-post {' '.join(command)}` ended with status {process.returncode}; finished "
            f"steps are kept. The end of {log}:\n{tail}"
        )
