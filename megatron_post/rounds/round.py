"""One round: its files, and what each of its steps does. A step that is run again continues, or writes the
same files again."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.load import load_config, parse, read_tree, to_yaml, validate
from megatron_post.config.overrides import merged
from megatron_post.config.references import escaped
from megatron_post.config.schema import Config
from megatron_post.config.settings import flatten
from megatron_post.config.stages import StageName
from megatron_post.convert.configs import read_model
from megatron_post.data.build import build_store
from megatron_post.display import make_console
from megatron_post.inference.failures import read_failures, write_failures
from megatron_post.inference.generate import Generate, generate, parts_of
from megatron_post.inference.prompts import read_prompts
from megatron_post.inference.ranks import wait_until
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.merge import MethodMerge, merge
from megatron_post.rounds.report import write_report
from megatron_post.rounds.select import (
    PREFERENCES,
    SFT,
    SUMMARY,
    Samples,
    Select,
    best_of,
    candidates,
    select,
)
from megatron_post.rounds.settings import RoundSettings, StageFile
from megatron_post.storage.files import write_json, write_pieces, write_whole
from megatron_post.storage.reading import read_object


@dataclass(frozen=True)
class Round:
    """Round `number` (from 1) of a run: its files, and its steps. Nothing of it need exist yet."""

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
        """The best checkpoint of the round before. Raises `ValueError` where that round is not finished."""
        return self.settings.start.policy if self.before is None else self.before.best

    @property
    def best(self) -> str:
        path = self.directory / "choice.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: {self.name} has not chosen its best checkpoint yet")
        return str(read_object(path, "the choice of a round").get("best"))

    @property
    def reward(self) -> str:
        return self.settings.start.reward or str(self.directory / "reward" / "hf")

    def stage(self, name: StageName) -> StageFile:
        """What is known of a stage's config before its model and data are there."""
        path = getattr(self.settings.stages, name)
        return parse(StageFile, read_tree(path), origin=path)

    @property
    def stores_reference(self) -> bool:
        """Whether DPO reads its reference's log-probabilities from the store."""
        dpo = self.stage("dpo").dpo
        return dpo.needs_reference and dpo.reference == "store"

    def collect(self) -> None:
        """Preferences for the first reward model: the verifier's, on the policy's own answers."""
        responses = self.directory / "collected.jsonl"
        count = self.settings.generate.collected_samples
        self._generate(self.policy, self._prompts, responses, seed=1, samples=count)
        if _leads():
            self._select(Samples(responses=str(responses)), "collected")

    def pack_reward(self) -> None:
        self._pack("reward")

    def generate(self) -> None:
        """The policy's samples, and behind them those of the policy before."""
        parts = [self.directory / "samples-policy.jsonl"]
        self._generate(self.policy, self._prompts, parts[0], seed=2)
        count = self.settings.generate.previous_samples
        if count and self.before is not None and self.before.policy != self.policy:
            parts.append(self.directory / "samples-previous.jsonl")
            self._generate(self.before.policy, self._prompts, parts[1], seed=3, samples=count)
        if _leads():
            failures = [row for part in parts for row in read_failures(part)]
            write_failures(self.directory / "samples.jsonl", failures)
            pieces = (part.read_text(encoding="utf-8") for part in parts)
            write_pieces(self.directory / "samples.jsonl", pieces)

    def select(self) -> None:
        samples = Samples(
            responses=str(self.directory / "samples.jsonl"), scores=str(self.directory / "scores.jsonl")
        )
        found = self._select(samples, "selection")
        self.console.print(
            f"{found['sft_rows']} rows to train on, {found['preferences']} preferences, {found['ties']} ties",
            highlight=False,
        )

    def pack_sft(self) -> None:
        self._pack("sft")

    def pack_dpo(self) -> None:
        self._pack("dpo")

    def average(self) -> None:
        target = self.directory / "average"
        if not target.exists():
            merge(self.merge_plan, target, report=self._say)

    @property
    def merge_plan(self) -> MethodMerge:
        """What is averaged. Raises `ConfigError` for what its method cannot do."""
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

    def choose(self) -> None:
        """The best of SFT, DPO and average on the validation prompts; the later one where two are equal.
        Then its answers to the held-out prompts, of which `evaluate` tells."""
        paths = {n: str(self.directory / n / "hf") for n in ("sft", "dpo")}
        paths |= {"average": str(self.directory / "average")}
        validation = self.settings.data.validation
        answers = {name: self.directory / f"validation-{name}.jsonl" for name in paths}
        for name, path in paths.items() if validation is not None else ():
            self._generate(path, {"prompts": validation}, answers[name], seed=0, greedy=True)
        if _leads():
            shares = {}
            if validation is not None:
                shares = {name: self._accuracy(answers[name], validation).share for name in paths}
            best = max(reversed(paths), key=lambda name: shares.get(name, 0.0)) if shares else "average"
            choice = {"best": paths[best], "stage": best, "validation": shares}
            write_json(self.directory / "choice.json", choice)
        wait_until((self.directory / "choice.json").is_file, "rank 0 to choose the best", self.console)
        held_out = {"prompts": self.settings.data.held_out}
        if self.number == 1:
            start = self.directory / "held_out-start.jsonl"
            self._generate(self.policy, held_out, start, seed=0, greedy=True)
        self._generate(self.best, held_out, self.directory / "held_out.jsonl", seed=0, greedy=True)
        self._generate(self.best, held_out, self.directory / "held_out-samples.jsonl", seed=4)

    def evaluate(self) -> None:
        """Accuracy of the best checkpoint on held-out prompts: greedy, of one sample, and of the best of K by
        the reward model alone. Nothing without a verifier."""
        verifier, held_out = self.settings.select.verifier, self.settings.data.held_out
        result = read_object(self.directory / "choice.json", "the choice of a round")
        if verifier is not None:
            files = {"greedy": "held_out.jsonl"} | (
                {"start": "held_out-start.jsonl"} if self.number == 1 else {}
            )
            for name, file in files.items():
                result[name] = vars(self._accuracy(self.directory / file, held_out))
            samples = Samples(
                responses=str(self.directory / "held_out-samples.jsonl"),
                scores=str(self.directory / "held_out-scores.jsonl"),
            )
            # a weight of 0: the verifier is the judge here, not the chooser
            options: dict[str, Any] = {"verifier": verifier, "verifier_weight": 0.0}
            options["max_bad_rows"] = self.settings.data.max_bad_rows
            found = candidates(
                parse(Select, {"prompts": held_out, "samples": [samples], **options}, origin="evaluate")
            )
            every = [c.verdict.correct for group in found.values() for c in group if c.verdict is not None]
            # what failed is not right
            failures = read_failures(self.directory / "held_out-samples.jsonl")
            unanswered = {row["prompt"] for row in failures} - found.keys()
            best = [best_of(group, tie=self.settings.select.tie)[0] for group in found.values()]
            right = sum(c is not None and c.verdict is not None and c.verdict.correct for c in best)
            result["one_sample"] = vars(Accuracy(sum(every), len(every) + len(failures)))
            result["best_of_k"] = vars(Accuracy(right, len(best) + len(unanswered)))
            result["k"] = self.settings.generate.sampling.samples
            self.console.print(
                f"{self.name}: {result['stage']} is best; held-out accuracy {Accuracy(**result['greedy'])}",
                highlight=False,
            )
        write_json(self.directory / "evaluation.json", result)

    def report(self) -> None:
        """Write `report.html`, about this round and the accuracies of those before it."""
        rounds = [Round(self.settings, n, self.console) for n in range(1, self.number + 1)]
        write_report(
            self.directory / "report.html",
            title=f"{self.settings.run_dir}, round {self.number} of {self.settings.rounds}",
            policy=self.policy,
            best=self.best,
            evaluations=[read_object(r.directory / "evaluation.json", "an evaluation") for r in rounds],
            selection=read_object(self.directory / "selection" / SUMMARY, "a selection"),
            preferences=self.directory / "selection" / PREFERENCES,
            runs={stage: self.directory / stage for stage in ("reward", "sft", "dpo")},
        )

    @property
    def _prompts(self) -> dict[str, Any]:
        """This round's prompts: the file, and which of its rows."""
        data = self.settings.data
        if data.prompts_per_round is None:
            return {"prompts": data.prompts}
        available = len(read_prompts(data.prompts, max_bad_rows=data.max_bad_rows))
        turns = max(1, available // data.prompts_per_round)
        skip = (self.number - 1) % turns * data.prompts_per_round
        return {"prompts": data.prompts, "skip": skip, "max_prompts": data.prompts_per_round}

    def _generate(
        self,
        model: str,
        prompts: dict[str, Any],
        output: Path,
        *,
        seed: int,
        greedy: bool = False,
        samples: int | None = None,
    ) -> None:
        """prompts: the file and the part of it. seed: of this use of a model in this round."""
        if output.exists() and not parts_of(output).exists():
            return
        chosen, data = self.settings.generate, self.settings.data
        changes: dict[str, Any] = {"seed": self.settings.seed * 1_000_003 + self.number * 101 + seed}
        changes |= {"temperature": 0.0, "samples": 1} if greedy else {}
        changes |= {} if samples is None else {"samples": samples}
        generate(
            Generate(
                model=model,
                **prompts,
                max_bad_rows=data.max_bad_rows,
                max_failed=chosen.max_failed,
                system=chosen.system,
                sampling=chosen.sampling.model_copy(update=changes),
                backend=chosen.backend,
                part=chosen.part,
            ),
            output,
            console=self.console,
        )

    def _select(self, samples: Samples, name: str) -> dict[str, Any]:
        data = self.settings.data
        values = self.settings.select.model_dump() | {"prompts": data.prompts, "samples": [samples]}
        values["max_bad_rows"] = data.max_bad_rows
        return select(parse(Select, values, origin="select"), self.directory / name)

    def _accuracy(self, answers: Path, prompts: str) -> Accuracy:
        """Of one response a prompt; a prompt that failed has no right one."""
        values: dict[str, Any] = {"prompts": prompts, "samples": [Samples(responses=str(answers))]}
        values["verifier"] = self.settings.select.verifier
        values["max_bad_rows"] = self.settings.data.max_bad_rows
        found = candidates(parse(Select, values, origin="evaluate"))
        right = [c.verdict is not None and c.verdict.correct for group in found.values() for c in group]
        return Accuracy(sum(right), len(right) + len(read_failures(answers)))

    def config(
        self, stage: StageName, model: str, sources: Iterable[dict[str, Any]], *, times: int = 1
    ) -> Config:
        """A stage's file, completed by what the round decides; `times` its steps. Raises `ConfigError` with
        every error."""
        directory = self.directory / stage
        path = getattr(self.settings.stages, stage)
        values = {
            "stage": stage,
            "run_dir": str(directory),
            "seed": self.settings.seed + self.number,
            "model": read_model(Path(model)).model_dump() | {"init_from": model},
            "tokenizer": {"path": model},
            "data": {"store": str(directory / "store"), "sources": list(sources), "eval_sources": []},
            "train": {"export_hf": True},
        }
        config = validate(merged(read_tree(path), escaped(values)), origin=path)
        train = config.train.model_copy(update={"steps": times * config.train.steps})
        return config.model_copy(update={"train": train})

    def similar_run(self, stage: StageName) -> Config:
        """A stage's config with the first round's model, which can be made before this round has begun."""
        start = self.settings.start.base or self.settings.start.policy
        return self.config(stage, start, [{"name": "any", "path": "any"}])

    def stage_config(self, stage: StageName) -> Config:
        """What the packing of a stage writes, and its training reads. Raises `ConfigError` with every error.

        The reward model is trained on all batches so far, of which a number tells the newest. DPO is trained
        on the newest batch alone. SFT is trained on what was selected: in this round, where it goes on from
        the policy, and in all rounds so far, where it starts from `start.base`, which has seen none of it.
        """
        start = self.settings.start
        if stage == "dpo":
            path = str(self.directory / "selection" / PREFERENCES)
            return self.config("dpo", str(self.directory / "sft" / "hf"), [_selected("newest", path)])
        if stage == "reward":
            batches = [*start.preferences]
            if not batches:
                first = Round(self.settings, 1, self.console)
                batches = [str(first.directory / "collected" / PREFERENCES)]
            earlier = [Round(self.settings, n, self.console) for n in range(1, self.number)]
            batches += [str(r.directory / "selection" / PREFERENCES) for r in earlier]
            sources = [_selected(f"batch-{i}", path) | {"batch": i} for i, path in enumerate(batches)]
            return self.config("reward", start.base or self.policy, sources)
        first_round = 1 if start.base else self.number
        rounds = [Round(self.settings, n, self.console) for n in range(first_round, self.number + 1)]
        selected = [_selected(r.name, str(r.directory / "selection" / SFT)) for r in rounds]
        sources = [*selected, *(json.loads(s.model_dump_json()) for s in self.settings.data.sft)]
        times = len(rounds) if self.settings.stages.sft_steps_a_round else 1
        return self.config("sft", start.base or self.policy, sources, times=times)

    def check_packed(self, stage: StageName) -> None:
        """Raises `ValueError` where a stage's file has changed since its data was packed. Training reads what
        was written then, and would pass over the change."""
        path = self.directory / stage / "config.yaml"
        before, after = flatten(load_config(path)), flatten(self.stage_config(stage))
        changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        if changed:
            lines = [f"  {key}: {before.get(key)} there, {after.get(key)} here" for key in changed]
            raise ValueError(
                f"{getattr(self.settings.stages, stage)} says something else than {path}, which "
                f"{self.name}/{stage}-pack wrote\n" + "\n".join(lines) + "\nundo the change, or take it with "
                f"--again-from {self.name}/{stage}-pack"
            )

    def _pack(self, stage: StageName) -> None:
        """Write a stage's config, and the store that it names."""
        config = self.stage_config(stage)
        for left_by_a_kill in (self.directory / stage).glob(".store.*.partial"):
            shutil.rmtree(left_by_a_kill)
        summaries = build_store(config, console=make_console(quiet=True), overwrite=True)
        write_whole(self.directory / stage / "config.yaml", to_yaml(config))
        packed = summaries["train"]
        steps, batch = config.train.steps, config.train.global_batch
        self._say(
            f"{packed.tokens:,} tokens in {packed.num_packs:,} packs; {steps:,} steps of {batch} packs are "
            f"{steps * batch / packed.num_packs:.1f} epochs"
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def _selected(name: str, path: str) -> dict[str, Any]:
    """A source of rows that `select` wrote, which say beside their messages where they come from."""
    return {"name": name, "path": path, "ignore": ["provenance"]}


def _leads() -> bool:
    """Whether this rank of a step does what is not drawing."""
    return rank_from_environment()[0] == 0
