"""The steps of a round in their order, each with its command or its action and what it writes."""

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_post.config.rewards import models_of
from megatron_post.config.schema import Config
from megatron_post.config.stages import StageName
from megatron_post.curation.settings import users_of_gpus
from megatron_post.inference.settings import gpus_of
from megatron_post.rounds.round import Round
from megatron_post.rounds.round_actions import (
    average,
    choose_best,
    collect,
    curate_selected,
    evaluate,
    export_comparisons,
    generate_samples,
    import_comparisons,
    merge_variants,
    pack,
    report,
    select_samples,
)
from megatron_post.rounds.settings import RoundSettings

# `score` counts blank responses as bad rows. `select` then checks that only these have no score.
_ANY_BAD_ROWS = "data.max_bad_rows=1000000000"


@dataclass(frozen=True)
class RoundStep:
    """A step of a round, which is an action of this process or a command for ranks.

    outputs: the files that are removed before the step is repeated. ranks: those of a chain's job. per_node:
    the largest number of them on a node. draws: whether any number of ranks can share the generation of
    samples. Only training steps have the last four fields. run_dir is their directory. check raises
    `ValueError` if the stage's packing is out of date. similar_run is a config with the same layout and shape
    of the model, for checks before the step's own config exists. array: the name of the job whose tasks this
    step and its neighbours with the same name are in a chain. gpus_per_rank: GPUs that each rank uses, if the
    machine has some.
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
    similar_run: Callable[..., Config] | None = None
    array: str | None = None
    gpus_per_rank: int = 0

    @property
    def ranks_of_a_node(self) -> int:
        """Ranks of this step on each node of a cluster."""
        return min(self.ranks, self.per_node)

    @property
    def ranks_here(self) -> int:
        """Ranks of this step without a cluster. A generating step uses as many as fit on this machine."""
        return self.ranks_of_a_node if self.draws else self.ranks

    def own_command(self, path: str | Path, overrides: Sequence[str]) -> tuple[str, ...]:
        """The command that runs only this step of a round file."""
        return ("round", str(path), "--only", self.name, *overrides)


def all_steps(settings: RoundSettings, console: Console) -> list[RoundStep]:
    """Every step of every round, in order."""
    return [s for n in range(1, settings.rounds + 1) for s in _steps(Round(settings, n, console))]


def check_packed(steps: Sequence[RoundStep], to_do: Set[str]) -> None:
    """Raise `ValueError` if a stage will be trained without packing again, and its file has changed."""
    for step in steps:
        packing = step.name.partition("-train")[0] + "-pack"
        if step.check is not None and step.name in to_do and packing not in to_do:
            step.check()


def _steps(r: Round) -> list[RoundStep]:
    settings, steps = r.settings, list[RoundStep]()
    samples = [*_files_of_models(r, "samples-policy"), *_files_of_models(r, "samples-previous")]
    generating = _drawing(r, "generate", generate_samples, *samples, "samples.jsonl")
    # People compare responses before the reward model is trained, because it is trained on what they prefer.
    if settings.annotate is not None:
        steps += [generating, *_comparing(r)]
    if settings.trains_reward:
        if r.number == 1 and not settings.start.preferences and settings.annotate is None:
            collected = _files_of_models(r, "collected")
            steps.append(_drawing(r, "collect", collect, *collected, "collected"))
        steps += [_packing(r, "reward"), *_training(r, "reward")]
    steps += [
        *([generating] if settings.annotate is None else []),
        *_scoring(r, "score", "samples.jsonl", "scores.jsonl"),
        _action(r, "select", select_samples, "selection"),
        *_curating(r),
        _packing(r, "sft"),
        *_training(r, "sft"),
        _packing(r, "dpo"),
    ]
    # The reference is the SFT model, and its log-probabilities are written into the store of the pairs. So
    # both steps come first.
    if r.stores_reference:
        roles = f"dpo.trained_roles=[{','.join(r.stage('dpo').dpo.trained_roles)}]"
        overrides = (*_layout(r, "dpo"), roles)
        stores = list(dict.fromkeys(r.store("dpo", number) for number in range(len(r.run_dirs("dpo")))))
        for number, store in enumerate(stores, start=1):
            arguments = ("reference", str(store), "--model", str(r.directory / "sft" / "hf"))
            name = f"reference-{number}" if len(stores) > 1 else "reference"
            steps.append(_command(r, name, "dpo", (*arguments, *overrides), f"{name}.log"))
    held_out = ("held_out.jsonl", "held_out-start.jsonl", "held_out-samples.jsonl")
    validation = (f"validation-{name}.jsonl" for name in ("sft", "dpo", "average"))
    return [
        *steps,
        *_training(r, "dpo"),
        _action(r, "average", average, "average"),
        _drawing(r, "choose", choose_best, "choice.json", *held_out, *validation),
        *_scoring(r, "score-held-out", "held_out-samples.jsonl", "held_out-scores.jsonl"),
        _action(r, "evaluate", evaluate, "evaluation.json"),
        _action(r, "report", report, "report.html"),
    ]


def _files_of_models(r: Round, name: str) -> list[str]:
    """The file of samples, and those of several models that answer the prompts of their capabilities."""
    # The policy and the models of capabilities, which are SFT, DPO and average after the first round.
    most = 1 + max(len(r.settings.start.policies), 3 * r.settings.generate.by_capability)
    return [f"{name}.jsonl", *(f"{name}-{n}.jsonl" for n in range(1, most + 1) if most > 1)]


def _action(r: Round, name: str, action: Callable[[Round], None], *outputs: str) -> RoundStep:
    paths = tuple(r.directory / output for output in outputs)
    return RoundStep(f"{r.name}/{name}", paths, partial(action, r))


def _comparing(r: Round) -> list[RoundStep]:
    """The steps around the work of people. The second one fails until they have answered."""
    return [
        _action(r, "annotate-export", export_comparisons, r.pages.name, r.key.name),
        _action(r, "annotate-import", import_comparisons, r.annotated.name, r.annotation.name),
    ]


def _packing(r: Round, stage: StageName) -> RoundStep:
    paths: list[Path] = []
    for number, directory in enumerate(r.run_dirs(stage)):
        paths += [r.store(stage, number), directory / "config.yaml"]
    outputs = [str(path.relative_to(r.directory)) for path in dict.fromkeys(paths)]
    return _action(r, f"{stage}-pack", partial(pack, stage=stage), *outputs)


def _curating(r: Round) -> list[RoundStep]:
    settings = r.curation
    if settings is None:
        return []
    step = _action(r, "curate", curate_selected, "curation")
    return [replace(step, gpus_per_rank=int(bool(users_of_gpus(settings))))]


def _drawing(r: Round, name: str, action: Callable[[Round], None], *outputs: str) -> RoundStep:
    drawing = r.settings.generate
    gpus = gpus_of(drawing.backend)
    per_node = max(1, r.settings.ranks_per_node // gpus)
    step = _action(r, name, action, *outputs)
    return replace(step, ranks=drawing.copies, per_node=per_node, draws=True, gpus_per_rank=gpus)


def _command(r: Round, name: str, stage: StageName, arguments: tuple[str, ...], output: str) -> RoundStep:
    """A step that runs a command on ranks. stage: the stage whose layout the command uses."""
    return RoundStep(
        f"{r.name}/{name}",
        (r.directory / output,),
        command=arguments,
        ranks=r.settings.ranks or r.stage(stage).parallel.model_size,
        per_node=r.settings.ranks_per_node,
        gpus_per_rank=1,
    )


def _training(r: Round, stage: StageName) -> list[RoundStep]:
    """The training of a stage. A sweep trains each variant, and then averages their models."""
    steps, variants = list[RoundStep](), r.variants(stage)
    for number, directory in enumerate(r.run_dirs(stage)):
        name = f"{stage}-train-{number + 1}" if variants else f"{stage}-train"
        arguments = ("train", str(directory / "config.yaml"))
        step = replace(
            _command(r, name, stage, arguments, str(directory.relative_to(r.directory))),
            run_dir=directory,
            check=partial(r.check_packed, stage, number),
            similar_run=partial(r.similar_run, stage, number),
            array=f"{r.name}/{stage}-train" if variants else None,
        )
        steps.append(step)
    if variants:
        steps.append(_action(r, f"{stage}-merge", partial(merge_variants, stage=stage), f"{stage}/hf"))
    return steps


def _scoring(r: Round, name: str, rows: str, output: str) -> list[RoundStep]:
    """A step for each reward model. With a list `reward` their names are numbered."""
    steps, separators = [], models_of(r.settings.reward)
    files = r.score_files(output)
    for number, (model, directory) in enumerate(r.reward_models.items(), start=1):
        separator = separators.get(model)
        own = () if separator is None else (f"data.steps.separator={json.dumps(separator)}",)
        paths = (str(r.directory / rows), "--output", str(files[model]))
        arguments = ("score", directory, *paths, _ANY_BAD_ROWS, *_layout(r, "reward"), *own)
        step = f"{name}-{number}" if r.settings.reward else name
        steps.append(_command(r, step, "reward", arguments, files[model].name))
    return steps


def _layout(r: Round, stage: StageName) -> tuple[str, ...]:
    """A stage's layout and precision as overrides, so that scores and references are those of training."""
    file = r.stage(stage)
    parallel = file.parallel
    if stage == "reward":  # packs are scored one by one, which the interleaved schedule does not support
        parallel = parallel.model_copy(update={"virtual_pipeline": 1})
    values = {f"parallel.{key}": value for key, value in parallel.model_dump(exclude_defaults=True).items()}
    values |= {f"precision.{key}": v for key, v in file.precision.model_dump(exclude_defaults=True).items()}
    values |= {"data.pack_length": file.data.pack_length} if stage == "reward" else {}
    return tuple(f"{key}={str(value).lower()}" for key, value in values.items())
