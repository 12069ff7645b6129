"""`megatron-post round`: N rounds of reward model, rejection sampling, SFT, DPO and averaging.

The steps stand in one list. `run_rounds` does those that are not done, one after the other; the same list is
written as a chain file for `launch round`, a job a step.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.load import to_yaml
from megatron_post.convert.configs import read_model
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.rounds.backends import gpus_of
from megatron_post.rounds.checks import check_backend, check_files, check_models
from megatron_post.rounds.failures import failures_of
from megatron_post.rounds.files import write_whole
from megatron_post.rounds.generate import take_gpus
from megatron_post.rounds.ranks import run_on_ranks
from megatron_post.rounds.settings import RoundSettings, StageName, load_round
from megatron_post.rounds.state import State, alone
from megatron_post.rounds.steps import Round
from megatron_post.storage.reading import did_you_mean

# the step before's, the fence's numbers, and what the launcher knows of a run
_NOT_OF_TRAINING = ("config.yaml", "store", "incarnations", "slurm")
# `score` counts blank responses as bad rows; `select` then checks that nothing but these went unscored
_ANY_BAD_ROWS = "data.max_bad_rows=1000000000"


@dataclass(frozen=True)
class Step:
    """A step of a round: what this process does, or a command on ranks.

    outputs: what is removed before the step is done anew on demand. ranks, per_node: of a chain's job, and
    how many of them a node has at most. run_dir, stage: of a training run. draws: its ranks, which may be any
    number, share the drawing of samples.
    """

    name: str
    outputs: tuple[Path, ...]
    action: Callable[[], None] | None = None
    command: tuple[str, ...] = ()
    ranks: int = 1
    per_node: int = 1
    run_dir: Path | None = None
    stage: StageName | None = None
    draws: bool = False

    @property
    def ranks_here(self) -> int:
        """Ranks of this step without a cluster: where it draws, as many as the machine has room for."""
        return min(self.ranks, self.per_node) if self.draws else self.ranks


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
        if again_from is not None:
            _forget(steps[names.index(again_from) :], state)
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


def all_steps(settings: RoundSettings, console: Console) -> list[Step]:
    """Every step of every round, in order."""
    return [s for n in range(1, settings.rounds + 1) for s in _steps(Round(settings, n, console))]


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


def _like(settings: RoundSettings, stage: StageName) -> list[str]:
    """A config of a stage's layout and model, as arguments of `train`."""
    start = settings.start.base or settings.start.policy
    model = read_model(Path(start)).model_dump_json()
    of_the_round = ("run_dir=any", f"model={model}", f"tokenizer.path={start}", "data.store=any")
    return [getattr(settings.stages, stage), f"stage={stage}", *of_the_round]


def _steps(r: Round) -> list[Step]:
    d, steps = r.directory, []
    settings = r.settings

    def act(name: str, action: Callable[[], None], *outputs: str) -> None:
        steps.append(Step(f"{r.name}/{name}", tuple(d / output for output in outputs), action))

    def draw(name: str, action: Callable[[], None], *outputs: str) -> None:
        drawing = settings.generate
        per_node = max(1, settings.ranks_per_node // gpus_of(drawing.backend))
        paths = tuple(d / output for output in outputs)
        steps.append(Step(f"{r.name}/{name}", paths, action, (), drawing.copies, per_node, draws=True))

    def command(name: str, stage: StageName, words: tuple[str, ...], output: str, *, trains: bool) -> None:
        ranks = settings.ranks or r.stage(stage).parallel.model_size
        trained = (d / output, stage) if trains else ()
        places = (ranks, settings.ranks_per_node)
        steps.append(Step(f"{r.name}/{name}", (d / output,), None, words, *places, *trained))

    def train(stage: StageName) -> None:
        command(f"{stage}-train", stage, ("train", str(d / stage / "config.yaml")), stage, trains=True)

    def score(name: str, rows: str, output: str) -> None:
        words = ("score", r.reward, str(d / rows), "--output", str(d / output), _ANY_BAD_ROWS)
        command(name, "reward", (*words, *_layout(r, "reward")), output, trains=False)

    if settings.start.reward is None:
        if r.number == 1 and not settings.start.preferences:
            draw("collect", r.collect, "collected.jsonl", "collected")
        act("reward-pack", r.pack_reward, "reward/store", "reward/config.yaml")
        train("reward")
    draw("generate", r.generate, "samples-policy.jsonl", "samples-previous.jsonl", "samples.jsonl")
    score("score", "samples.jsonl", "scores.jsonl")
    act("select", r.select, "selection")
    act("sft-pack", r.pack_sft, "sft/store", "sft/config.yaml")
    train("sft")
    act("dpo-pack", r.pack_dpo, "dpo/store", "dpo/config.yaml")
    if r.stores_reference:
        words = ("reference", str(d / "dpo" / "store"), "--model", str(d / "sft" / "hf"))
        command("reference", "dpo", (*words, *_layout(r, "dpo")), "reference.log", trains=False)
    train("dpo")
    act("average", r.average, "average")
    held_out = ("held_out.jsonl", "held_out-start.jsonl", "held_out-samples.jsonl")
    validation = (f"validation-{name}.jsonl" for name in ("sft", "dpo", "average"))
    draw("choose", r.choose, "choice.json", *held_out, *validation)
    score("score-held-out", "held_out-samples.jsonl", "held_out-scores.jsonl")
    act("evaluate", r.evaluate, "evaluation.json")
    act("report", r.report, "report.html")
    return steps


def _layout(r: Round, stage: StageName) -> tuple[str, ...]:
    """A stage's layout and precision as overrides, so that scores and references are what training sees."""
    file = r.stage(stage)
    parallel = file.parallel
    if stage == "reward":  # scores are taken pack by pack, which the interleaved schedule cannot
        parallel = parallel.model_copy(update={"virtual_pipeline": 1})
    values = {f"parallel.{key}": value for key, value in parallel.model_dump(exclude_defaults=True).items()}
    values |= {f"precision.{key}": v for key, v in file.precision.model_dump(exclude_defaults=True).items()}
    values |= {"data.pack_length": file.data.pack_length} if stage == "reward" else {}
    return tuple(f"{key}={str(value).lower()}" for key, value in values.items())


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
