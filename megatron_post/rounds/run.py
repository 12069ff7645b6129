"""`megatron-post round`: N rounds of reward model, rejection sampling, SFT, DPO and averaging.

`run_rounds` does the steps that are not done, one after the other. The same list is written as a chain file
for `launch round`, with a job for each step.
"""

import json
import shutil
import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.load import to_yaml
from megatron_post.config.stages import StageName
from megatron_post.convert.configs import read_model
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.rounds.checks import check_backend, check_files, check_models
from megatron_post.rounds.failures import failures_of
from megatron_post.rounds.generate import take_gpus
from megatron_post.rounds.ranks import run_on_ranks
from megatron_post.rounds.settings import RoundSettings, load_round
from megatron_post.rounds.state import State, alone
from megatron_post.rounds.steps import Step, all_steps
from megatron_post.storage.files import write_whole
from megatron_post.storage.reading import did_you_mean

# the step before's, the fence's numbers, and what the launcher knows of a run
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
    """Run the rounds of a file; what is done already is passed over, so the same call resumes.

    only: do this step alone, as the jobs of a chain do; ranks of such a job share the drawing in it, and all
    else is done by rank 0. held: whoever started these ranks holds the lock and records what is done.
    again_from: forget this step and all behind it, and remove what they made. Raises `ValueError` for what a
    user can mend; all finished steps are kept.
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
        if again_from is not None:
            raise ValueError("--again-from is for one process, which starts the ranks of its steps")
        drawing = {step.name: step.action for step in steps if step.draws}
        action = drawing.get(only or "")
        if action is None:
            raise ValueError(
                f"several ranks share the drawing of one step: give --only and one of {', '.join(drawing)}; "
                "or start one process, which starts the ranks of its steps"
            )
        take_gpus(settings.generate.backend)
        if held or rank > 0:
            action()
            return
    with alone(Path(settings.run_dir)) as lock:
        state = state_of(settings)
        again = [] if again_from is None else steps[names.index(again_from) :]
        wanted = state.left(names) if only is None else (only,)
        _check_packed(steps, {*wanted, *(step.name for step in again)})
        _forget(again, state)
        chosen = state.left(names) if only is None else (only,)
        for step in steps:
            if step.name in chosen:
                shared = step.draws and size == 1 and step.ranks_here > 1
                words = (*_by_itself(step, path, overrides), "--held") if shared else step.command
                _do(step, words, state, console, lock)


def state_of(settings: RoundSettings) -> State:
    """The record of a run: more rounds may be asked for later, and other ranks."""
    values = settings.model_dump_json(
        exclude={"rounds": True, "ranks": True, "ranks_per_node": True, "generate": {"copies", "max_failed"}}
    )
    return State(Path(settings.run_dir), json.loads(values))


def write_chain(path: str | Path, overrides: Sequence[str], target: str | Path, *, console: Console) -> int:
    """Write the steps as a chain file for `launch round`. Returns their number."""
    tree = chain_of(path, overrides, console=console)
    write_whole(Path(target), to_yaml(tree))
    return len(tree["steps"])


def chain_of(
    path: str | Path, overrides: Sequence[str], *, console: Console, needs_inputs: bool = True
) -> dict[str, Any]:
    """The steps that are left as a chain of jobs, each after the one before, in the terms of a chain file.

    needs_inputs: look at the models and files that the first round starts with, too. Raises `ValueError` for
    what a user can mend, and where no step is left.
    """
    settings = load_round(path, overrides)
    if needs_inputs:
        check_models(settings)
        check_files(settings)
    steps, values = all_steps(settings, console), list[dict[str, Any]]()
    if Path(settings.run_dir, "state.json").is_file():
        left = state_of(settings).left([step.name for step in steps])
        steps = [step for step in steps if step.name in left]
        if needs_inputs:
            _check_packed(steps, set(left))
    if not steps:
        raise ValueError(
            f"{settings.run_dir}: every step is done; `megatron-post round {path} --again-from STEP` does "
            "one and those behind it anew"
        )
    for step in steps:
        command = step.command or _by_itself(step, path, overrides)
        per_node = min(step.ranks, step.per_node)
        if step.ranks % per_node:
            raise ValueError(
                f"{path}: {step.name} takes {step.ranks} ranks, which do not fill nodes of {per_node} "
                f"(ranks_per_node={settings.ranks_per_node})"
            )
        entry: dict[str, Any] = {"name": step.name, "command": list(command)}
        entry |= {"ranks_per_node": per_node, "nodes": step.ranks // per_node}
        if step.stage is not None:
            entry |= {"run_dir": str(step.run_dir)}
            entry |= {"like": _like(settings, step.stage)} if needs_inputs else {}
        values.append(entry | ({"after": [values[-1]["name"]]} if values else {}))
    return {"run_dir": settings.run_dir, "steps": values}


def _check_packed(steps: Sequence[Step], to_do: Set[str]) -> None:
    """Raises `ValueError` where a stage is to be trained as it was packed, and its file has changed since."""
    for step in steps:
        packing = step.name.replace("-train", "-pack")
        if step.check is not None and step.name in to_do and packing not in to_do:
            step.check()


def _like(settings: RoundSettings, stage: StageName) -> list[str]:
    """A config of a stage's layout and model, as arguments of `train`."""
    start = settings.start.base or settings.start.policy
    model = read_model(Path(start)).model_dump_json()
    of_the_round = ("run_dir=any", f"model={model}", f"tokenizer.path={start}", "data.store=any")
    return [getattr(settings.stages, stage), f"stage={stage}", *of_the_round]


def _by_itself(step: Step, path: str | Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """The command that does what a step does, and no other."""
    return ("round", str(path), "--only", step.name, *overrides)


def _do(step: Step, words: Sequence[str], state: State, console: Console, lock: int) -> None:
    """words: of a command on ranks; none: this process does the step. lock: its ranks hold it too, so that no
    other process begins beside ranks that outlive this one."""
    console.print(step.name, style="bold", highlight=False)
    started = time.perf_counter()
    if words:
        log = Path(step.outputs[0].parent, f"{Path(step.name).name}.log")
        shown = ("step ", "rank ")
        run_on_ranks(words, ranks=step.ranks_here, log=log, console=console, shown=shown, inherited=(lock,))
    else:
        assert step.action is not None
        step.action()
    state.finish(step.name, time.perf_counter() - started)


def _forget(steps: Sequence[Step], state: State) -> None:
    """Marks go first: a run killed in between does all of it again."""
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
