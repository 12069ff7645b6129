"""Collects the responses to each prompt with their scores and verdicts, and finds the best of them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_post.config.rewards import Reward, Total, combine, score_of
from megatron_post.data.row_refusals import template_mark
from megatron_post.inference.prompts import Prompt, read_prompts
from megatron_post.inference.request import messages_as_json
from megatron_post.inference.samples import read_samples
from megatron_post.rounds.select_settings import Samples, Select
from megatron_post.rounds.verifier import Verdict, judge
from megatron_post.storage.files import read_lines

_ONLY = "the reward model"  # its name where `scores` is one file


@dataclass(frozen=True)
class Candidate:
    """A response with its reward (None without scores), its verdict, and the score that ranks it.

    total: the parts of the reward, if there is a list of rewards.
    """

    row: dict[str, Any]
    reward: float | None
    verdict: Verdict | None
    score: float
    total: Total | None = None

    @property
    def text(self) -> str:
        return str(self.row["messages"][-1]["content"])

    @property
    def is_templated(self) -> bool:
        """Whether the text has markers of a chat template or a user turn, which `data pack` would refuse."""
        return template_mark(self.text, role="assistant") is not None

    @property
    def is_below(self) -> bool:
        """Whether a reward is below its threshold, so that the response is never chosen."""
        return self.total is not None and bool(self.total.below)

    @property
    def is_whole(self) -> bool:
        """Whether the response is complete and may be trained.

        It is not if it is blank, cut off at `max_tokens`, a tool call without its result, or templated. A
        model that is trained on cut responses learns to stop anywhere.
        """
        return bool(self.text) and self.row["finish"] == "stop" and not self.is_templated

    def provenance(self) -> dict[str, Any]:
        """The origin of the response and its scores, for the rows that `select` writes."""
        known = {key: self.row[key] for key in ("prompt", "sample", "checkpoint", "seed")}
        correct = None if self.verdict is None else self.verdict.correct
        known |= {"reward": self.reward, "correct": correct, "score": self.score}
        if self.total is not None:
            known |= {"rewards": dict(self.total.parts), "below": list(self.total.below)}
        return known


def candidates(settings: Select) -> dict[int, list[Candidate]]:
    """The responses to each prompt by its number, in the order of the files. Raises as `select` does."""
    prompts = {p.number: p for p in read_prompts(settings.prompts, max_bad_rows=settings.max_bad_rows)}
    read = [read_samples(Path(samples.responses)) for samples in settings.samples]
    rows = [row for found in read for row in found]
    _check_rows(rows, prompts, settings)
    totals = _totals(settings, read, [prompts[row["prompt"]].capability for row in rows])
    verdicts: Sequence[Verdict | None] = [None] * len(rows)
    if settings.verifier is not None:
        asked = [(prompts[row["prompt"]], row["messages"][-1]["content"]) for row in rows]
        verdicts = judge(settings.verifier, asked)
    by_prompt: dict[int, list[Candidate]] = defaultdict(list)
    for row, total, verdict in zip(rows, totals, verdicts, strict=True):
        bonus = settings.verifier_weight if verdict is not None and verdict.correct else 0.0
        reward = None if total is None else total.value
        parts = total if settings.reward else None
        by_prompt[row["prompt"]].append(Candidate(row, reward, verdict, (reward or 0.0) + bonus, parts))
    return dict(sorted(by_prompt.items()))


def best_of(found: Sequence[Candidate], *, tie: float) -> tuple[Candidate | None, int]:
    """(the best complete response or None, the number of responses with another text that tie with it).

    A response with a reward below its threshold is not the best one.

    Among responses that tie, the text that the model generated most often is the best, since the model is
    most certain of it. If that ties too, the first one is taken, and not the shortest.
    """
    whole = [candidate for candidate in found if candidate.is_whole and not candidate.is_below]
    if not whole:
        return None, 0
    top = max(candidate.score for candidate in whole)
    tied = [candidate for candidate in whole if candidate.score >= top - tie]
    times = Counter(candidate.text for candidate in tied)
    # max returns the first of equal values, which is the response that was generated first.
    best = max(tied, key=lambda candidate: times[candidate.text])
    return best, len(tied) - times[best.text]


def _check_rows(rows: Sequence[dict[str, Any]], prompts: Mapping[int, Prompt], settings: Select) -> None:
    """Raise `ValueError` for a response to a prompt that is not in the file, and for a duplicate response."""
    seen = set()
    for row in rows:
        prompt = prompts.get(row["prompt"])
        asked = [message for message in row["messages"][:-1] if message["role"] != "system"]
        if prompt is None or asked != [m for m in messages_as_json(prompt.messages) if m["role"] != "system"]:
            raise ValueError(
                f"{settings.prompts} has no prompt in line {row['prompt']} to which there is a response, or "
                "another one; select with the file from which the responses were generated"
            )
        draw = (row["checkpoint"], row["prompt"], row["sample"], row["seed"])
        if draw in seen:
            raise ValueError(
                f"sample {row['sample']} of prompt {row['prompt']} by {row['checkpoint']} is there twice; "
                "name each file of responses once"
            )
        seen.add(draw)


def _totals(
    settings: Select, read: Sequence[Sequence[dict[str, Any]]], capabilities: Sequence[str]
) -> list[Total | None]:
    """The reward of each response of all files, or None without one. read: the rows of each file."""
    if all(samples.scores is None for samples in settings.samples):
        return [None] * len(capabilities)
    # The scores of one reward model are a list of one reward.
    rewards = settings.reward or (Reward(name="reward", models=(_ONLY,)),)
    scores = [
        [
            [
                score
                for samples, rows in zip(settings.samples, read, strict=True)
                for score in _scores(samples, model, reward, rows)
            ]
            for model in reward.models
        ]
        for reward in rewards
    ]
    return combine(rewards, scores, capabilities)


def _scores(
    samples: Samples, model: str, reward: Reward, rows: Sequence[dict[str, Any]]
) -> list[float | None]:
    """A model's score for each row, or None for a blank response, which `score` skips."""
    file = samples.scores[model] if isinstance(samples.scores, dict) else samples.scores
    assert file is not None
    scores: dict[int, float] = {}
    for line in read_lines(Path(file)):
        score = score_of(line, reward, origin=file)
        if not isinstance(line.get("row"), int):
            raise ValueError(f"{file}: no score of one response: {str(line)[:100]}")
        scores[line["row"]] = score
    wanted = {i for i, row in enumerate(rows, start=1) if row["messages"][-1]["content"]}
    if scores.keys() != wanted:
        raise ValueError(
            f"{file} scores {len(scores)} rows, {samples.responses} has {len(wanted)} responses "
            "that are not blank: these are not the scores of that file"
        )
    return [scores.get(i) for i in range(1, len(rows) + 1)]
