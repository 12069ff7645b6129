"""The actions of a round's steps. A step that runs again continues, or writes the same files again."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_post.config.load import parse, to_yaml
from megatron_post.config.stages import StageName
from megatron_post.curation.run import curate
from megatron_post.data.build import GroupSummary, build_store
from megatron_post.display import make_console
from megatron_post.inference.failures import read_failures, write_failures
from megatron_post.inference.generate import Generate, generate, parts_of
from megatron_post.inference.prompts import read_prompts
from megatron_post.inference.ranks import wait_until
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.annotation.answers import import_answers
from megatron_post.rounds.annotation.export import export_pairs
from megatron_post.rounds.candidates import best_of, candidates
from megatron_post.rounds.merge import merge
from megatron_post.rounds.ranking import open_ranker
from megatron_post.rounds.report import write_report
from megatron_post.rounds.round import Round
from megatron_post.rounds.select import PREFERENCES, SUMMARY, select
from megatron_post.rounds.select_settings import Samples, Select
from megatron_post.rounds.settings import Stages
from megatron_post.rounds.validation import accuracy, best_by_capability
from megatron_post.storage.files import write_json, write_pieces, write_whole
from megatron_post.storage.reading import read_object


def collect(r: Round) -> None:
    """Write preferences for the first reward model, which the verifier makes of the policy's answers."""
    responses = r.directory / "collected.jsonl"
    count = r.settings.generate.collected_samples
    parts = _draw_all(r, r.policies, responses, seed=1, samples=count)
    if _is_rank_0():
        _join(parts, responses)
        _select(r, Samples(responses=str(responses)), "collected")


def generate_samples(r: Round) -> None:
    """Write the policy's samples, followed by those of the previous round's policy or `start.previous`."""
    parts = _draw_all(r, r.policies, r.directory / "samples-policy.jsonl", seed=2)
    count = r.settings.generate.previous_samples
    if r.before is not None:
        previous = r.before.policies
    else:
        previous = {} if r.settings.start.previous is None else {"": r.settings.start.previous}
    if count and previous and previous != r.policies:
        parts += _draw_all(r, previous, r.directory / "samples-previous.jsonl", seed=3, samples=count)
    if _is_rank_0():
        _join(parts, r.directory / "samples.jsonl")


def export_comparisons(r: Round) -> None:
    """Write the pairs that people compare, and the directory for their answers."""
    assert r.settings.annotate is not None
    samples, seed = r.directory / "samples.jsonl", r.settings.seed * 1_000_003 + r.number
    found = export_pairs([samples], r.pages, r.key, r.settings.annotate, seed=seed)
    r.answers.mkdir(exist_ok=True)
    _print(r, f"{found}; the files that people export belong into {r.answers}")


def import_comparisons(r: Round) -> None:
    """Write the preferences of people. Raises `ValueError` until enough pairs are answered."""
    assert r.settings.annotate is not None
    enough, most = r.settings.annotate.enough, r.settings.data.max_bad_rows
    found = import_answers(r.pages, r.key, r.answers, r.annotated, enough=enough, max_bad_rows=most)
    write_json(r.annotation, found.counts)
    _print(r, str(found))


def select_samples(r: Round) -> None:
    found = _select(r, r.samples("samples.jsonl", "scores.jsonl"), "selection")
    r.console.print(
        f"{found['sft_rows']} rows to train on, {found['preferences']} preferences, {found['ties']} ties",
        highlight=False,
    )


def curate_selected(r: Round) -> None:
    """Write the rows that the steps of the curation file keep, for SFT."""
    settings = r.curation
    assert settings is not None
    report = curate(settings, rank=0, size=1, open_ranker=open_ranker, console=r.console)
    if not report["kept"]:
        raise ValueError(f"{r.settings.curate} keeps none of the selected rows, so SFT has no data")


def pack(r: Round, stage: StageName) -> None:
    """Write the config of each training run of a stage, and the stores that they name."""
    written: dict[str, GroupSummary] = {}
    for number, directory in enumerate(r.run_dirs(stage)):
        config = r.stage_config(stage, number)
        store = config.data.store
        if store not in written:
            # A packing that was killed may have left its unfinished store, under the number of its process.
            for left_by_a_kill in Path(store).parent.glob(".store.*.partial"):
                shutil.rmtree(left_by_a_kill)
            found = build_store(config, console=make_console(quiet=True), overwrite=True)
            written[store] = found.groups["train"]
        write_whole(directory / "config.yaml", to_yaml(config))
        packed, steps, batch = written[store], config.train.steps, config.train.global_batch
        variant = f"variant {number + 1}: " if r.variants(stage) else ""
        _print(
            r,
            f"{variant}{packed.tokens:,} tokens in {packed.num_packs:,} packs; {steps:,} steps of {batch} "
            f"packs are {steps * batch / packed.num_packs:.1f} epochs",
        )


def merge_variants(r: Round, stage: StageName) -> None:
    """Average the models of a stage's variants."""
    target = r.directory / stage / "hf"
    if not target.exists():
        merge(r.merge_of(stage), target, report=partial(_print, r))


def average(r: Round) -> None:
    target = r.directory / "average"
    if not target.exists():
        merge(r.merge_plan, target, report=partial(_print, r))


def choose_best(r: Round) -> None:
    """Choose the best of SFT, DPO and average on the validation prompts. Of two equal ones the later wins.

    Then write the best model's answers to the held-out prompts, for `evaluate`.
    """
    paths = {n: str(r.directory / n / "hf") for n in ("sft", "dpo")}
    paths |= {"average": str(r.directory / "average")}
    validation = r.settings.data.validation
    answers = {name: r.directory / f"validation-{name}.jsonl" for name in paths}
    for name, path in paths.items() if validation is not None else ():
        _draw(r, path, {"prompts": validation}, answers[name], seed=0, greedy=True)
    if _is_rank_0():
        shares = {}
        if validation is not None:
            shares = {name: accuracy(r, answers[name], validation).share for name in paths}
        # max returns the first of equal values, so the reversed order prefers the later model.
        best = max(reversed(paths), key=lambda name: shares.get(name, 0.0)) if shares else "average"
        choice = {"best": paths[best], "stage": best, "validation": shares}
        choice["by_capability"] = best_by_capability(r, paths, answers)
        write_json(r.directory / "choice.json", choice)
    # All ranks read the choice below, to generate with the best model.
    wait_until((r.directory / "choice.json").is_file, "rank 0 to choose the best", r.console)
    held_out = {"prompts": r.settings.data.held_out}
    if r.number == 1:
        start = r.directory / "held_out-start.jsonl"
        _draw(r, r.policy, held_out, start, seed=0, greedy=True)
    _draw(r, r.best, held_out, r.directory / "held_out.jsonl", seed=0, greedy=True)
    _draw(r, r.best, held_out, r.directory / "held_out-samples.jsonl", seed=4)


def evaluate(r: Round) -> None:
    """Write the best checkpoint's accuracies on held-out prompts, if there is a verifier.

    They are those of greedy decoding, of one sample, and of the best of K by the reward model only.
    """
    verifier, held_out = r.settings.select.verifier, r.settings.data.held_out
    result = read_object(r.directory / "choice.json", "the choice of a round")
    if verifier is not None:
        files = {"greedy": "held_out.jsonl"} | ({"start": "held_out-start.jsonl"} if r.number == 1 else {})
        for name, file in files.items():
            result[name] = vars(accuracy(r, r.directory / file, held_out))
        samples = r.samples("held_out-samples.jsonl", "held_out-scores.jsonl")
        # With a weight of 0 the verifier only judges the best response, and does not help to choose it.
        options: dict[str, Any] = {"verifier": verifier, "verifier_weight": 0.0}
        options["reward"] = r.settings.reward
        options["max_bad_rows"] = r.settings.data.max_bad_rows
        found = candidates(
            parse(Select, {"prompts": held_out, "samples": [samples], **options}, origin="evaluate")
        )
        every = [c.verdict.correct for group in found.values() for c in group if c.verdict is not None]
        # failed prompts count as wrong
        failures = read_failures(r.directory / "held_out-samples.jsonl")
        unanswered = {row["prompt"] for row in failures} - found.keys()
        best = [best_of(group, tie=r.settings.select.tie)[0] for group in found.values()]
        right = sum(c is not None and c.verdict is not None and c.verdict.correct for c in best)
        result["one_sample"] = vars(Accuracy(sum(every), len(every) + len(failures)))
        result["best_of_k"] = vars(Accuracy(right, len(best) + len(unanswered)))
        result["k"] = r.settings.generate.sampling.samples
        r.console.print(
            f"{r.name}: {result['stage']} is best; held-out accuracy {Accuracy(**result['greedy'])}",
            highlight=False,
        )
    write_json(r.directory / "evaluation.json", result)


def report(r: Round) -> None:
    """Write `report.html` about this round, with the accuracies of earlier rounds."""
    rounds = [Round(r.settings, n, r.console) for n in range(1, r.number + 1)]
    write_report(
        r.directory / "report.html",
        title=f"{r.settings.run_dir}, round {r.number} of {r.settings.rounds}",
        policy=r.policy,
        best=r.best,
        evaluations=[read_object(each.directory / "evaluation.json", "an evaluation") for each in rounds],
        selection=read_object(r.directory / "selection" / SUMMARY, "a selection"),
        preferences=r.directory / "selection" / PREFERENCES,
        runs={
            f"{stage}-{number}" if r.variants(stage) else stage: directory
            for stage in Stages.trained
            for number, directory in enumerate(r.run_dirs(stage), start=1)
        },
        people=None
        if r.settings.annotate is None
        else (read_object(r.annotation, "the counts of answers"), r.annotated),
    )


def _draw_all(
    r: Round, policies: Mapping[str, str], output: Path, *, seed: int, samples: int | None = None
) -> list[Path]:
    """Write the samples of each model for the prompts of its capabilities. Returns the files.

    policies: by capability, where "" is the model of all other capabilities. One model has one file, which is
    `output`.
    """
    prompts = r.prompts
    models = {model: dict(prompts) for model in dict.fromkeys(policies.values())}
    if len(models) == 1:
        _draw(r, policies[""], prompts, output, seed=seed, samples=samples)
        return [output]
    limits = {"skip": prompts.get("skip", 0), "limit": prompts.get("max_prompts")}
    rows = read_prompts(prompts["prompts"], max_bad_rows=r.settings.data.max_bad_rows, **limits)
    asked: dict[str, set[str]] = {}
    for prompt in rows:
        asked.setdefault(policies.get(prompt.capability, policies[""]), set()).add(prompt.capability)
    files = []
    for number, (model, capabilities) in enumerate(asked.items(), start=1):
        files.append(output.with_name(f"{output.stem}-{number}.jsonl"))
        own = {**models[model], "capabilities": tuple(sorted(capabilities))}
        _draw(r, model, own, files[-1], seed=seed, samples=samples)
    return files


def _draw(
    r: Round,
    model: str,
    prompts: dict[str, Any],
    output: Path,
    *,
    seed: int,
    greedy: bool = False,
    samples: int | None = None,
) -> None:
    """Write a model's samples to `output`, unless they are complete.

    prompts: the file and the range of its rows. seed: distinguishes the uses of a model in a round.
    """
    if output.exists() and not parts_of(output).exists():
        return
    chosen, data = r.settings.generate, r.settings.data
    # Every use of a model in every round has another seed, so that no two of them repeat samples.
    changes: dict[str, Any] = {"seed": r.settings.seed * 1_000_003 + r.number * 101 + seed}
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
        console=r.console,
    )


def _join(parts: Sequence[Path], output: Path) -> None:
    """Join files of samples and their failures, unless `output` is the only one of them."""
    if list(parts) == [output]:
        return
    write_failures(output, [row for part in parts for row in read_failures(part)])
    write_pieces(output, (part.read_text(encoding="utf-8") for part in parts))


def _select(r: Round, samples: Samples, name: str) -> dict[str, Any]:
    data = r.settings.data
    values = r.settings.select.model_dump() | {"prompts": r.prompt_file, "samples": [samples]}
    values["max_bad_rows"] = data.max_bad_rows
    values["reward"] = () if samples.scores is None else r.settings.reward
    return select(parse(Select, values, origin="select"), r.directory / name)


def _print(r: Round, text: str) -> None:
    r.console.print(text, highlight=False, soft_wrap=True)


def _is_rank_0() -> bool:
    """Whether this is rank 0, which does everything except generating."""
    return rank_from_environment()[0] == 0
