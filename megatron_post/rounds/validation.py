"""The accuracy of a model's answers, and the best model of a round for each capability."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from megatron_post.config.load import parse
from megatron_post.inference.failures import read_failures
from megatron_post.inference.prompts import read_prompts
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.candidates import candidates
from megatron_post.rounds.round import Round
from megatron_post.rounds.select_settings import Samples, Select


def accuracy(r: Round, answers: Path, prompts: str, *, only: Container[int] | None = None) -> Accuracy:
    """The accuracy of one response per prompt. A failed prompt counts as wrong.

    only: the numbers of the prompts that count, or None for all.
    """
    values: dict[str, Any] = {"prompts": prompts, "samples": [Samples(responses=str(answers))]}
    values["verifier"] = r.settings.select.verifier
    values["max_bad_rows"] = r.settings.data.max_bad_rows
    found = candidates(parse(Select, values, origin="evaluate"))
    counted = [group for number, group in found.items() if only is None or number in only]
    right = [c.verdict is not None and c.verdict.correct for group in counted for c in group]
    failed = [row for row in read_failures(answers) if only is None or row["prompt"] in only]
    return Accuracy(sum(right), len(right) + len(failed))


def best_by_capability(r: Round, paths: Mapping[str, str], answers: Mapping[str, Path]) -> dict[str, Any]:
    """The best model for each capability of the validation prompts, with the shares of right answers."""
    validation = r.settings.data.validation
    if validation is None or not r.settings.generate.by_capability:
        return {}
    prompts = read_prompts(validation, max_bad_rows=r.settings.data.max_bad_rows)
    found: dict[str, Any] = {}
    for capability in sorted({prompt.capability for prompt in prompts} - {""}):
        numbers = {prompt.number for prompt in prompts if prompt.capability == capability}
        shares = {name: accuracy(r, answers[name], validation, only=numbers).share for name in paths}
        # Of two equal models the later one wins, as it does over all prompts.
        best = max(reversed(list(shares)), key=shares.__getitem__)
        found[capability] = {"best": paths[best], "stage": best, "validation": shares}
    return found
