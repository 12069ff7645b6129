"""The steps of a round in their order, each with its command or its action and what it writes."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_post.config.schema import Config
from megatron_post.config.stages import StageName
from megatron_post.inference.settings import gpus_of
from megatron_post.rounds.round import Round
from megatron_post.rounds.settings import RoundSettings

# `score` counts blank responses as bad rows; `select` then checks that nothing but these went unscored
_ANY_BAD_ROWS = "data.max_bad_rows=1000000000"


@dataclass(frozen=True)
class RoundStep:
    """A step of a round: what this process does, or a command on ranks.

    outputs: what is removed before the step is done anew on demand. ranks, per_node: of a chain's job, and
    how many of them a node has at most. draws: its ranks, which may be any number, share the drawing of
    samples. Training steps alone have a run_dir, a check, which raises `ValueError` where the stage's packing
    is out of date, and a similar_run, whose config has their layout and the shape of their model before
    theirs is written.
    """

    name: str
    outputs: tuple[Path, ...]
    action: Callable[[], None] | None = None
    command: tuple[str, ...] = ()
    ranks: int = 1
    per_node: int = 1
    run_dir: Path | None = None
    draws: bool = False
    check: Callable[[], None] | None = None
    similar_run: Callable[[], Config] | None = None

    @property
    def ranks_of_a_node(self) -> int:
        """Ranks of this step on each node of a cluster."""
        return min(self.ranks, self.per_node)

    @property
    def ranks_here(self) -> int:
        """Ranks of this step without a cluster: where it draws, as many as the machine has room for."""
        return self.ranks_of_a_node if self.draws else self.ranks

    def by_itself(self, path: str | Path, overrides: Sequence[str]) -> tuple[str, ...]:
        """The command that does this step of a round file, and no other."""
        return ("round", str(path), "--only", self.name, *overrides)


def all_steps(settings: RoundSettings, console: Console) -> list[RoundStep]:
    """Every step of every round, in order."""
    return [s for n in range(1, settings.rounds + 1) for s in _steps(Round(settings, n, console))]


def check_packed(steps: Sequence[RoundStep], to_do: Set[str]) -> None:
    """Raises `ValueError` where a stage is to be trained as it was packed, and its file has changed since."""
    for step in steps:
        packing = step.name.replace("-train", "-pack")
        if step.check is not None and step.name in to_do and packing not in to_do:
            step.check()


def _steps(r: Round) -> list[RoundStep]:
    d, steps = r.directory, []
    settings = r.settings

    def act(name: str, action: Callable[[], None], *outputs: str) -> None:
        steps.append(RoundStep(f"{r.name}/{name}", tuple(d / output for output in outputs), action))

    def draw(name: str, action: Callable[[], None], *outputs: str) -> None:
        drawing = settings.generate
        per_node = max(1, settings.ranks_per_node // gpus_of(drawing.backend))
        paths = tuple(d / output for output in outputs)
        steps.append(RoundStep(f"{r.name}/{name}", paths, action, (), drawing.copies, per_node, draws=True))

    def command(name: str, stage: StageName, words: tuple[str, ...], output: str, *, trains: bool) -> None:
        ranks = settings.ranks or r.stage(stage).parallel.model_size
        step = RoundStep(f"{r.name}/{name}", (d / output,), None, words, ranks, settings.ranks_per_node)
        if trains:
            step = replace(
                step,
                run_dir=d / output,
                check=partial(r.check_packed, stage),
                similar_run=partial(r.similar_run, stage),
            )
        steps.append(step)

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
