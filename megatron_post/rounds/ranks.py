"""A megatron-post command in processes of its own, under torchrun where it takes several ranks."""

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
    """Run what follows `megatron-post`. Lines that start with one of `shown` are printed, and all that the
    ranks say is in `log`. inherited: file descriptors that stay open in the process.

    Raises `ValueError` with the end of the log where the command fails.
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
        # of several ranks the launcher's own account of the others comes last
        reason = [line for line in lines[:-_LOG_TAIL] if line.startswith("megatron-post: ")][:1]
        tail = "".join([*reason, *lines[-_LOG_TAIL:]])
        raise ValueError(
            f"`megatron-post {' '.join(command)}` ended with status {process.returncode}; what was done "
            f"before is kept. The end of {log}:\n{tail}"
        )
