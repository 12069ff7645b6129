"""Short training runs for the checks, in this process or in one of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_post.bench.gpu_day.plan import RESULT

if TYPE_CHECKING:
    from megatron_post.config.schema import Config
    from megatron_post.data.store import Pack
    from megatron_post.train.trainer import Trainer

TINY = "configs/tiny/demo.yaml"
# environments of a run that another one is compared with. Transformer Engine's package may need a GPU
CPU = {"CUDA_VISIBLE_DEVICES": ""}
PORTABLE = {"GPU_DAY_PORTABLE": "1"}
Step = tuple[float, float]  # loss and gradient norm


@dataclass(frozen=True)
class Run:
    """Steps up to `last`, from the newest checkpoint in `directory`.

    settings: `key.path=value` on top of the tiny config. every: steps between checkpoints, 0 for none.
    die_after: the step behind which the process kills itself.
    """

    directory: str
    last: int
    stage: str = "sft"
    settings: Sequence[str] = ()
    every: int = 0
    die_after: int = 0


def apart(run: Run, environment: Mapping[str, str] | None = None) -> list[Step]:
    """The steps that a run takes in a process of its own. Raises `ValueError` with the end of what it said
    where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_post.bench.gpu_day.runs", json.dumps(asdict(run))],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
    )
    print(done.stdout + done.stderr, flush=True)
    if run.die_after and done.returncode == -signal.SIGKILL:
        return []
    if done.returncode:
        raise ValueError((done.stderr or done.stdout).strip()[-2000:])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return [(loss, norm) for loss, norm in json.loads(line.removeprefix(RESULT))]


def once(
    stage: str, last: int, settings: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> list[Step]:
    """The first steps of a run that leaves nothing behind, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        return apart(Run(directory, last, stage, tuple(settings)), environment)


def config_of(run: Run) -> "Config":
    """The tiny config on a store of random tokens, which it writes where there is none."""
    from megatron_post.bench.synthetic import write_synthetic
    from megatron_post.config.load import load_config

    directory = Path(run.directory)
    config = load_config(
        TINY,
        [
            f"run_dir={directory / 'run'}",
            f"stage={run.stage}",
            f"data.store={directory / 'store'}",
            "data.eval_sources=[]",
            "data.pack_length=512",
            "optimizer.warmup_steps=0",
            "optimizer.schedule=constant",
            "optimizer.lr=1e-3",
            "train.global_batch=2",
            *run.settings,
        ],
    )
    if not Path(config.data.store).exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_synthetic(Path(config.data.store), config, packs=64)
    return config


@contextlib.contextmanager
def training(config: "Config") -> Iterator[tuple["Trainer", Iterator[list["Pack"]], int]]:
    """Within this context: a trainer at the newest checkpoint, its packs, and the step that is done.

    Raises `ConfigError` for what this machine cannot run.
    """
    from megatron_post.bench.synthetic import open_synthetic
    from megatron_post.config.load import raise_for
    from megatron_post.parallel.topology import parallel_run
    from megatron_post.train.inputs import open_loader, rank_errors
    from megatron_post.train.parts import build_trainer

    raise_for(rank_errors(config, world_size=1))
    with parallel_run(config.parallel, seed=config.seed) as topology:
        trainer, start = build_trainer(config, topology)
        store = open_synthetic(Path(config.data.store), config)
        with open_loader(config, store, topology, start) as loader:
            yield trainer, loader, start.step


def steps_of(run: Run) -> list[Step]:
    """The steps of a run, in this process."""
    from megatron_post.train.checkpoint import Position

    taken: list[Step] = []
    config = config_of(run)
    with training(config) as (trainer, loader, done):
        for number in range(done + 1, run.last + 1):
            values = trainer.step(next(loader))
            taken.append((values["loss"], values["grad_norm"]))
            if run.every and number % run.every == 0:
                trainer.save(Position(number, number * config.train.global_batch))
            if number == run.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
        trainer.checkpoints.wait()
    return taken


def hide_transformer_engine() -> None:
    """Where the environment asks for the portable layers, Python finds no Transformer Engine from now on."""
    if os.environ.get("GPU_DAY_PORTABLE"):
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def say_result(content: Any) -> None:
    """The line that `apart` and `gpu_day` look for."""
    print(RESULT + json.dumps(content), flush=True)


if __name__ == "__main__":
    hide_transformer_engine()
    say_result(steps_of(Run(**json.loads(sys.argv[1]))))
