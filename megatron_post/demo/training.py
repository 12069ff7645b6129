"""Runs the demo's training: packs, and then starts torchrun, as a user would."""

from pathlib import Path

from rich.console import Console

from megatron_post.config.load import to_yaml
from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.display import make_console
from megatron_post.rounds.ranks import run_on_ranks

RANKS = 2  # the demo is designed for two cores


def pack(config: Config, console: Console) -> None:
    """Write the run's `config.yaml` and its store, and print how many tokens were packed."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    summaries = build_store(config, console=make_console(quiet=True)).groups
    for group, summary in summaries.items():
        packs = f"{summary.num_packs:,} packs of {config.data.pack_length:,}"
        console.print(f"{group}: {summary.tokens:,} tokens in {packs}")


def train(config: Config, console: Console) -> None:
    """Train under torchrun. Progress is shown, and all other output of the ranks is in `train.log`.

    Raises `ValueError` with the end of the log if training fails.
    """
    run_dir = Path(config.run_dir)
    command = ("train", str(run_dir / "config.yaml"))
    console.print(f"torchrun --nproc-per-node {RANKS} -m megatron_post {' '.join(command)}", style="dim")
    run_on_ranks(
        command, ranks=RANKS, log=run_dir / "train.log", console=console, shown=("step ", str(run_dir))
    )
