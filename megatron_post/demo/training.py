"""The demo's training runs: pack, then torchrun, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from megatron_post.config.load import to_yaml
from megatron_post.config.schema import Config
from megatron_post.data.build import build_store

_LOG_TAIL = 30


def pack(config: Config, console: Console) -> None:
    """Write the run's `config.yaml`, and the store that it names, and say how much was packed."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    summaries = build_store(config, console=Console(quiet=True))
    for group, summary in summaries.items():
        packs = f"{summary.num_packs:,} packs of {config.data.pack_length:,}"
        console.print(f"{group}: {summary.tokens:,} tokens in {packs}")


def train(config: Config, console: Console) -> None:
    """Train under torchrun. Progress is shown, everything else that the ranks say is in `train.log`.

    Raises `ValueError` with the end of the log where training fails.
    """
    run_dir, ranks = Path(config.run_dir), config.parallel.model_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_post", "train", str(run_dir / "config.yaml")]
    console.print(
        f"torchrun --nproc-per-node {ranks} -m megatron_post train {run_dir / 'config.yaml'}", style="dim"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = run_dir / "train.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(("step ", str(run_dir))):
                console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-_LOG_TAIL:])
        raise ValueError(f"training ended with status {process.returncode}; the end of {log}:\n{tail}")
