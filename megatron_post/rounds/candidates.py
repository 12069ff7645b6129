"""Collects the responses to each prompt with their scores and verdicts, and finds the best of them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_post.data.row_refusals import template_mark
from megatron_post.inference.prompts import Prompt, read_prompts
from megatron_post.inference.request import messages_as_json
from megatron_post.inference.samples import read_samples
from megatron_post.rounds.select_settings import Samples, Select
from megatron_post.rounds.verifier import Verdict, judge
from megatron_post.storage.files import read_lines


@dataclass(frozen=True)
class Candidate:
    """A response with its reward (None without scores), its verdict, and the score that ranks it."""

    row: dict[str, Any]
    reward: float | None
    verdict: Verdict | None
    score: float

    @property
    def text(self) -> str:
        return str(self.row["messages"][-1]["content"])

    @property
    def is_templated(self) -> bool:
        """Whether the text has markers of a chat template or a user turn, which `data pack` would refuse."""
        return template_mark(self.text, role="assistant") is not None

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
        return known | {"reward": self.reward, "correct": correct, "score": self.score}


def candidates(settings: Select) -> dict[int, list[Candidate]]:
    """The responses to each prompt by its number, in the order of the files. Raises as `select` does."""
    prompts = {p.number: p for p in read_prompts(settings.prompts, max_bad_rows=settings.max_bad_rows)}
    rows: list[dict[str, Any]] = []
    rewards: list[float | None] = []
    for samples in settings.samples:
        found = read_samples(Path(samples.responses))
        rows += found
        rewards += _rewards(samples, found)
    _check_rows(rows, prompts, settings)
    verdicts: Sequence[Verdict | None] = [None] * len(rows)
    if settings.verifier is not None:
        asked = [(prompts[row["prompt"]], row["messages"][-1]["content"]) for row in rows]
        verdicts = judge(settings.verifier, asked)
    by_prompt: dict[int, list[Candidate]] = defaultdict(list)
    for row, reward, verdict in zip(rows, rewards, verdicts, strict=True):
        bonus = settings.verifier_weight if verdict is not None and verdict.correct else 0.0
        by_prompt[row["prompt"]].append(Candidate(row, reward, verdict, (reward or 0.0) + bonus))
    return dict(sorted(by_prompt.items()))


def best_of(found: Sequence[Candidate], *, tie: float) -> tuple[Candidate | None, int]:
    """(the best complete response or None, the number of responses with another text that tie with it).

    Among responses that tie, the text that the model generated most often is the best, since the model is
    most certain of it. If that ties too, the first one is taken, and not the shortest.
    """
    whole = [candidate for candidate in found if candidate.is_whole]
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


def _rewards(samples: Samples, rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """A score for each row, or None for a blank response, which `score` skips."""
    if samples.scores is None:
        return [None] * len(rows)
    scores: dict[int, float] = {}
    for row in read_lines(Path(samples.scores)):
        try:
            number, (score,) = row["row"], row["scores"]
            if not isfinite(score):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{samples.scores}: no score of one response: {str(row)[:100]}") from None
        scores[number] = score
    wanted = {i for i, row in enumerate(rows, start=1) if row["messages"][-1]["content"]}
    if scores.keys() != wanted:
        raise ValueError(
            f"{samples.scores} scores {len(scores)} rows, {samples.responses} has {len(wanted)} responses "
            "that are not blank: these are not the scores of that file"
        )
    return [scores.get(i) for i in range(1, len(rows) + 1)]
