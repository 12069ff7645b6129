"""`Round` knows the files of one round, the models that it starts with, and the configs of its stages."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.load import load_config, parse, read_tree, validate
from megatron_post.config.overrides import merged
from megatron_post.config.references import escaped, resolved
from megatron_post.config.rewards import TRAINED, models_of
from megatron_post.config.schema import Config
from megatron_post.config.settings import flatten
from megatron_post.config.stages import StageName
from megatron_post.convert.configs import read_model
from megatron_post.curation.row import ANNOTATIONS
from megatron_post.curation.selection import KEPT
from megatron_post.curation.settings import Curation
from megatron_post.inference.prompts import read_prompts
from megatron_post.rounds.merge_settings import MethodMerge
from megatron_post.rounds.select import PREFERENCES, SFT
from megatron_post.rounds.select_settings import Samples
from megatron_post.rounds.settings import RoundSettings, StageFile
from megatron_post.rounds.sweep import SELECTED, Variant, mixed
from megatron_post.storage.reading import read_object


@dataclass(frozen=True)
class Round:
    """Round `number` (from 1) of a run. Its files need not exist yet."""

    settings: RoundSettings
    number: int
    console: Console

    @property
    def name(self) -> str:
        return f"round-{self.number:02d}"

    @property
    def directory(self) -> Path:
        return Path(self.settings.run_dir) / self.name

    @property
    def before(self) -> "Round | None":
        return Round(self.settings, self.number - 1, self.console) if self.number > 1 else None

    @property
    def policy(self) -> str:
        """The best checkpoint of the previous round. Raises `ValueError` if that round is not finished."""
        return self.settings.start.policy if self.before is None else self.before.best

    @property
    def best(self) -> str:
        path = self.directory / "choice.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: {self.name} has not chosen its best checkpoint yet")
        return str(read_object(path, "the choice of a round").get("best"))

    @property
    def pages(self) -> Path:
        """The directory of the pairs that people compare, which does not show the origin of a response."""
        return self.directory / "annotate"

    @property
    def key(self) -> Path:
        """The origins of the responses in `pages`. It is kept outside that directory."""
        return self.directory / "annotate-key.jsonl"

    @property
    def answers(self) -> Path:
        """The directory for the files that people export. No step removes it."""
        return self.directory / "answers"

    @property
    def annotated(self) -> Path:
        """The preferences of people."""
        return self.directory / "annotated.jsonl"

    @property
    def annotation(self) -> Path:
        """The counts of what people have answered."""
        return self.directory / "annotation.json"

    @property
    def selected(self) -> Path:
        """The preferences that `select` has made with the reward model."""
        return self.directory / "selection" / PREFERENCES

    @property
    def curation(self) -> Curation | None:
        """The settings of the step `curate`, or None without it. Raises `ConfigError`."""
        if self.settings.curate is None:
            return None
        source = {"name": SELECTED, "path": str(self.directory / "selection" / SFT)}
        tree = read_tree(self.settings.curate)
        values = {**tree, **escaped({"run": str(self.directory / "curation"), "sources": [source]})}
        return parse(Curation, resolved(values), origin=self.settings.curate)

    @property
    def sft_rows(self) -> Path:
        """The selected rows on which SFT is trained."""
        curated = self.settings.curate is not None
        return self.directory / "curation" / KEPT if curated else self.directory / "selection" / SFT

    @property
    def policies(self) -> dict[str, str]:
        """The model that answers the prompts of each capability. "" is that of all other capabilities."""
        if self.before is None:
            return {"": self.policy, **self.settings.start.policies}
        own = self.before.best_by_capability if self.settings.generate.by_capability else {}
        return {"": self.policy, **own}

    @property
    def best_by_capability(self) -> dict[str, str]:
        """The best model of this round for each capability of the validation prompts."""
        found = read_object(self.directory / "choice.json", "the choice of a round")
        return {name: str(each["best"]) for name, each in found.get("by_capability", {}).items()}

    @property
    def prompt_file(self) -> str:
        return self.settings.phase(self.number).prompts or self.settings.data.prompts

    @property
    def reward_models(self) -> dict[str, str]:
        """The directory of each reward model, by its name in the list `reward`.

        Without a list there is one model, with the name "".
        """
        trained = str(self.directory / "reward" / "hf")
        if not self.settings.reward:
            return {"": self.settings.start.reward or trained}
        return {name: trained if name == TRAINED else name for name in models_of(self.settings.reward)}

    def samples(self, responses: str, scores: str) -> Samples:
        """A file of responses with the scores of each reward model, as `select` reads them."""
        files = {name: str(file) for name, file in self.score_files(scores).items()}
        return Samples(
            responses=str(self.directory / responses), scores=files if self.settings.reward else files[""]
        )

    def score_files(self, scores: str) -> dict[str, Path]:
        """The file of each reward model's scores. With a list `reward` their names are numbered."""
        stem = scores.removesuffix(".jsonl")
        return {
            name: self.directory / (f"{stem}-{number}.jsonl" if self.settings.reward else scores)
            for number, name in enumerate(self.reward_models, start=1)
        }

    def stage(self, name: StageName) -> StageFile:
        """The part of a stage's config that is known before its model and data exist."""
        path = getattr(self.settings.stages, name)
        return parse(StageFile, read_tree(path), origin=path)

    @property
    def stores_reference(self) -> bool:
        """Whether DPO reads its reference's log-probabilities from the store."""
        dpo = self.stage("dpo").dpo
        return dpo.needs_reference and dpo.reference == "store"

    @property
    def merge_plan(self) -> MethodMerge:
        """The models and weights of the average. Raises `ConfigError` if they do not fit the method."""
        chosen = self.settings.average
        paths = {"policy": self.policy} | {n: str(self.directory / n / "hf") for n in ("sft", "dpo")}
        models = [
            {"model": paths[n], "weight": w, "density": chosen.density} for n, w in chosen.weights.items()
        ]
        values: dict[str, Any] = {"models": models, "method": chosen.method}
        if chosen.method in ("ties", "dare_ties"):
            values["base_model"] = self.settings.start.base or self.policy
        if chosen.method == "dare_ties":
            values["seed"] = self.settings.seed
        return parse(MethodMerge, values, origin="average")

    @property
    def prompts(self) -> dict[str, Any]:
        """The file of this round's prompts, and the range of its rows."""
        data = self.settings.data
        if data.prompts_per_round is None:
            return {"prompts": self.prompt_file}
        available = len(read_prompts(self.prompt_file, max_bad_rows=data.max_bad_rows))
        turns = max(1, available // data.prompts_per_round)
        # The rounds that use a file of prompts take its rows one range after another.
        phase = self.settings.phase(self.number)
        first = phase.from_round if phase.prompts else 1
        skip = (self.number - first) % turns * data.prompts_per_round
        return {"prompts": self.prompt_file, "skip": skip, "max_prompts": data.prompts_per_round}

    def variants(self, stage: StageName) -> tuple[Variant, ...]:
        """The variants of a stage that is trained several times. Empty if it is trained once."""
        return getattr(self.settings.stages.sweep, stage)

    def run_dirs(self, stage: StageName) -> list[Path]:
        """The directory of each training run of a stage."""
        directory, count = self.directory / stage, len(self.variants(stage))
        return [directory / f"variant-{number}" for number in range(1, count + 1)] or [directory]

    def store(self, stage: StageName, number: int) -> Path:
        """The packed data of training run `number` (from 0). Variants with the same data share a store."""
        variants = self.variants(stage)
        own = bool(variants) and variants[number].packs_alone
        return (self.run_dirs(stage)[number] if own else self.directory / stage) / "store"

    def merge_of(self, stage: StageName) -> MethodMerge:
        """The average of a stage's variants."""
        models = [
            {"model": str(directory / "hf"), "weight": variant.weight}
            for directory, variant in zip(self.run_dirs(stage), self.variants(stage), strict=True)
        ]
        return parse(MethodMerge, {"models": models, "method": "linear"}, origin=f"stages.sweep.{stage}")

    def config(
        self,
        stage: StageName,
        model: str,
        sources: Iterable[dict[str, Any]],
        *,
        times: int = 1,
        number: int = 0,
    ) -> Config:
        """The config of a stage's file with the values that the round sets. Raises `ConfigError`.

        times: the factor of the file's steps. number: of the stage's training run, from 0.
        """
        path = getattr(self.settings.stages, stage)
        variants = self.variants(stage)
        variant = variants[number] if variants else Variant()
        mix = variant.mix or (self.settings.phase(self.number).mix if stage == "sft" else {})
        chosen = mixed(list(sources), mix, selected=len(self._rounds_of_sft()))
        values = {
            "stage": stage,
            "run_dir": str(self.run_dirs(stage)[number]),
            "seed": self.settings.seed + self.number,
            "model": read_model(Path(model)).model_dump() | {"init_from": model},
            "tokenizer": {"path": model},
            "data": {"store": str(self.store(stage, number)), "sources": chosen, "eval_sources": []},
            "train": {"export_hf": True},
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in variant.set.items()]
        config = validate(merged(read_tree(path), escaped(values)), overrides, origin=path)
        train = config.train.model_copy(update={"steps": times * config.train.steps})
        return config.model_copy(update={"train": train})

    def similar_run(self, stage: StageName, number: int = 0, *, needs_model: bool = True) -> Config:
        """A stage's config with the first round's model, for checks before this round has begun.

        needs_model: raise `ValueError` if that model is not here. Otherwise the stage's file is the config.
        """
        start = self.settings.start.base or self.settings.start.policy
        if not needs_model and not Path(start).is_dir():
            variants = self.variants(stage)
            values = variants[number].set if variants else {}
            overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
            return load_config(getattr(self.settings.stages, stage), overrides)
        return self.config(stage, start, self._sources(stage), number=number)

    def stage_config(self, stage: StageName, number: int = 0) -> Config:
        """The config that the packing of a stage writes and its training reads. Raises `ConfigError`.

        number: of the stage's training run, from 0. DPO starts from the SFT model, and the others from
        `start.base` or the policy.
        """
        start, sources, times = self.settings.start, self._sources(stage), 1
        if stage == "dpo":
            return self.config("dpo", str(self.directory / "sft" / "hf"), sources, number=number)
        if stage == "sft" and self.settings.stages.sft_steps_a_round:
            times = len(self._rounds_of_sft())
        return self.config(stage, start.base or self.policy, sources, times=times, number=number)

    def _rounds_of_sft(self) -> "list[Round]":
        """The rounds whose selected rows SFT uses."""
        first = 1 if self.settings.start.base else self.number
        return [Round(self.settings, n, self.console) for n in range(first, self.number + 1)]

    def _sources(self, stage: StageName) -> list[dict[str, Any]]:
        """The sources of a stage's data.

        The reward model is trained on all batches so far, and `batch` numbers them so that the newest is
        known. DPO is trained on the newest batch only, which is that of people if they compare responses. If
        SFT starts from the policy, it is trained on the rows of this round. If it starts from `start.base`,
        which has seen no selected row, it is trained on those of all rounds so far.
        """
        if stage == "dpo":
            newest = self.selected if self.settings.annotate is None else self.annotated
            return [_selected("newest", str(newest))]
        if stage == "reward":
            batches = [*self.settings.start.preferences]
            people = self.settings.annotate is not None
            if not batches and not people:
                first = Round(self.settings, 1, self.console)
                batches = [str(first.directory / "collected" / PREFERENCES)]
            for earlier in (Round(self.settings, n, self.console) for n in range(1, self.number)):
                batches += [str(earlier.annotated)] if people else []
                batches.append(str(earlier.selected))
            batches += [str(self.annotated)] if people else []
            return [_selected(f"batch-{i}", path) | {"batch": i} for i, path in enumerate(batches)]
        selected = [_selected(r.name, str(r.sft_rows)) for r in self._rounds_of_sft()]
        return [*selected, *(json.loads(s.model_dump_json()) for s in self.settings.data.sft)]

    def check_packed(self, stage: StageName, number: int = 0) -> None:
        """Raise `ValueError` if a stage's file has changed since its data was packed.

        Training reads the config that the packing wrote, and would ignore the change silently.
        """
        path = self.run_dirs(stage)[number] / "config.yaml"
        before, after = flatten(load_config(path)), flatten(self.stage_config(stage, number))
        changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        if changed:
            lines = [f"  {key}: {before.get(key)} there, {after.get(key)} here" for key in changed]
            raise ValueError(
                f"{getattr(self.settings.stages, stage)} differs from {path}, which "
                f"{self.name}/{stage}-pack wrote\n"
                + "\n".join(lines)
                + "\nundo the change, or accept it with "
                f"--again-from {self.name}/{stage}-pack"
            )


def _selected(name: str, path: str) -> dict[str, Any]:
    """A source of rows that `select` or people wrote. Their notes are not trained."""
    return {"name": name, "path": path, "ignore": ["provenance", ANNOTATIONS]}
