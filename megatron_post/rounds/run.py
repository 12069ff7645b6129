"""`megatron-post round` runs N rounds of reward model, rejection sampling, SFT, DPO and averaging."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from megatron_post.inference.failures import failures_of
from megatron_post.inference.ranks import take_gpus
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.rounds.checks import check_backend, check_files, check_models
from megatron_post.rounds.ranks import run_on_ranks
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.state import State, state_of
from megatron_post.rounds.steps import RoundStep, all_steps, check_packed
from megatron_post.storage.lock import only_process_in
from megatron_post.storage.reading import did_you_mean

# Files in the directory of a training step that other steps, the fence and the launcher have written.
# A repeated training keeps these. With `incarnations` a process of the old run stays fenced off. But
# `skipped.jsonl` is removed, because the new run would skip the old run's packs.
_NOT_OF_TRAINING = ("config.yaml", "store", "incarnations", "slurm")


def run_rounds(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    console: Console,
    only: str | None = None,
    again_from: str | None = None,
    held: bool = False,
) -> None:
    """Run the rounds of a file. Finished steps are skipped, so the same call resumes.

    only: run only this step, as the jobs of a chain do. The ranks of such a job share the generation, and
    rank 0 does everything else. held: the process that has started these ranks holds the lock and records
    finished steps. again_from: repeat this step and all later ones, after removing their outputs. Raises
    `ValueError` for errors that a user can mend. Finished steps are kept.
    """
    settings = load_round(path, overrides)
    rank, size, _ = rank_from_environment()
    check_models(settings)
    check_files(settings)
    check_backend(settings)
    steps = all_steps(settings, console)
    names = [step.name for step in steps]
    for name in (only, again_from):
        if name is not None and name not in names:
            raise ValueError(f"no step {name!r}{did_you_mean(name, names)}; steps are {', '.join(names)}")
    if size > 1:
        action = _shared_action(steps, only=only, again_from=again_from)
        # This must come before CUDA starts, because the visible GPUs cannot change afterwards.
        take_gpus(settings.generate.backend)
        # Rank 0 takes the lock below and records the step, unless the process that has started the ranks
        # does.
        if held or rank > 0:
            action()
            return
    with only_process_in(Path(settings.run_dir)) as lock:
        state = state_of(settings)
        again = [] if again_from is None else steps[names.index(again_from) :]
        wanted = state.remaining(names) if only is None else (only,)
        # This is checked before anything is removed.
        check_packed(steps, {*wanted, *(step.name for step in again)})
        _undo(again, state)
        chosen = state.remaining(names) if only is None else (only,)
        for step in steps:
            if step.name in chosen:
                shared = step.draws and size == 1 and step.ranks_here > 1
                command = (*step.own_command(path, overrides), "--held") if shared else step.command
                _run_step(step, command, state, console, lock)


def _shared_action(
    steps: Sequence[RoundStep], *, only: str | None, again_from: str | None
) -> Callable[[], None]:
    """The action that several ranks run together. Raises `ValueError` for options that need one process."""
    if again_from is not None:
        raise ValueError("--again-from is for one process, which starts the ranks of its steps")
    drawing = {step.name: step.action for step in steps if step.draws}
    action = drawing.get(only or "")
    if action is None:
        raise ValueError(
            f"several ranks can only run one generating step: give --only and one of {', '.join(drawing)}; "
            "or start one process, which starts the ranks of its steps"
        )
    return action


def _run_step(step: RoundStep, command: Sequence[str], state: State, console: Console, lock: int) -> None:
    """Run a step and record it. command: a command for ranks, or empty if this process runs the action.

    lock: a file descriptor that the ranks inherit. If they outlive this process, they still hold the lock, so
    no other process can start the same round.
    """
    console.print(step.name, style="bold", highlight=False)
    started = time.perf_counter()
    if command:
        log = Path(step.outputs[0].parent, f"{Path(step.name).name}.log")
        shown = ("step ", "rank ")
        run_on_ranks(command, ranks=step.ranks_here, log=log, console=console, shown=shown, inherited=(lock,))
    else:
        assert step.action is not None
        step.action()
    state.finish(step.name, time.perf_counter() - started)


def _undo(steps: Sequence[RoundStep], state: State) -> None:
    """Forget steps and remove their outputs.

    The record is changed first. If the process is killed in between, the next run repeats all of these steps.
    """
    state.forget([step.name for step in steps])
    for step in steps:
        if step.run_dir is not None:
            for entry in step.run_dir.iterdir() if step.run_dir.is_dir() else ():
                if entry.name not in _NOT_OF_TRAINING:
                    _remove(entry)
        else:
            for output in step.outputs:
                _remove(failures_of(output))
                for unfinished in (".partial", ".converting"):
                    _remove(output.with_name(f"{unfinished}-{output.name}"))
                _remove(output)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
