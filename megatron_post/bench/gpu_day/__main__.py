"""Half an hour of one NVIDIA GPU: what a CPU cannot prove, in pieces that take nine minutes at most.

    python -m megatron_post.bench.gpu_day [--output DIR] [--piece NAME]... [--minutes 9]

It needs the standard library and torch to start, since it may have to install the rest, which `prepare` has
gathered: `python -m megatron_post.bench.gpu_day.prepare`.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_post.bench.gpu_day.day import Day
from megatron_post.bench.gpu_day.install import build_engine, install
from megatron_post.bench.gpu_day.plan import OUTPUT, PIECES


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process with status 1 where a check has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    place = os.environ.get("GPU_DAY_OUTPUT", OUTPUT)  # of a process that a check starts
    parser.add_argument("--output", default=place, help="directory of results, and of what was prepared")
    parser.add_argument(
        "--piece", action="append", choices=list(PIECES), help="again and again; default: all"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of a piece")
    parser.add_argument("--build-engine", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # its checks end with it
    output = Path(chosen.output).resolve()
    if chosen.build_engine:
        build_engine(output)
        return
    install(output)
    day = Day(output)
    print(f"{day.machine['GPU'] or 'no GPU: a dry run, which measures nothing'}; results go to {output}")
    for name in chosen.piece or PIECES:
        day.run(name, minutes=chosen.minutes)
    print(f"{output / 'results.md'} has the table")
    if day.failed():
        sys.exit(1)


if __name__ == "__main__":
    main()
