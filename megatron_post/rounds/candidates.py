"""Responses with their scores and verdicts, by prompt, and the best of each prompt."""

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
from megatron_post.rounds.verifier import Verdict, verify
from megatron_post.storage.files import read_lines


@dataclass(frozen=True)
class Candidate:
    """A response with what is known of it. reward: None without scores; score: what ranks it."""

    row: dict[str, Any]
    reward: float | None
    verdict: Verdict | None
    score: float

    @property
    def text(self) -> str:
        return str(self.row["messages"][-1]["content"])

    @property
    def is_templated(self) -> bool:
        """Whether it spells a chat template or the user's next turn, which `data pack` would refuse."""
        return template_mark(self.text, role="assistant") is not None

    @property
    def is_whole(self) -> bool:
        """Neither blank, nor cut off at `max_tokens`, nor a call that waits for a tool: training on half a
        response teaches to stop anywhere. Nor is it templated."""
        return bool(self.text) and self.row["finish"] == "stop" and not self.is_templated

    def provenance(self) -> dict[str, Any]:
        """Where it comes from."""
        known = {key: self.row[key] for key in ("prompt", "sample", "checkpoint", "seed")}
        correct = None if self.verdict is None else self.verdict.correct
        return known | {"reward": self.reward, "correct": correct, "score": self.score}


def candidates(settings: Select) -> dict[int, list[Candidate]]:
    """By prompt: its responses, in the order of the files. Raises as `select` does."""
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
        verdicts = verify(settings.verifier, asked)
    by_prompt: dict[int, list[Candidate]] = defaultdict(list)
    for row, reward, verdict in zip(rows, rewards, verdicts, strict=True):
        bonus = settings.verifier_weight if verdict is not None and verdict.correct else 0.0
        by_prompt[row["prompt"]].append(Candidate(row, reward, verdict, (reward or 0.0) + bonus))
    return dict(sorted(by_prompt.items()))


def best_of(found: Sequence[Candidate], *, tie: float) -> tuple[Candidate | None, int]:
    """(the best whole response or None, how many responses of other words tie with it). Of those that tie,
    what was drawn most often, for the model is surest of it; then the first drawn, not the shortest."""
    whole = [candidate for candidate in found if candidate.is_whole]
    if not whole:
        return None, 0
    top = max(candidate.score for candidate in whole)
    tied = [candidate for candidate in whole if candidate.score >= top - tie]
    times = Counter(candidate.text for candidate in tied)
    best = max(tied, key=lambda candidate: times[candidate.text])
    return best, len(tied) - times[best.text]


def _check_rows(rows: Sequence[dict[str, Any]], prompts: Mapping[int, Prompt], settings: Select) -> None:
    """Raises `ValueError` for responses to other prompts than the file's, and for one that is there twice."""
    seen = set()
    for row in rows:
        prompt = prompts.get(row["prompt"])
        asked = [message for message in row["messages"][:-1] if message["role"] != "system"]
        if prompt is None or asked != [m for m in messages_as_json(prompt.messages) if m["role"] != "system"]:
            raise ValueError(
                f"{settings.prompts} has no prompt in line {row['prompt']} to which there is a response, or "
                "another one; select with the file that was generated from"
            )
        draw = (row["checkpoint"], row["prompt"], row["sample"], row["seed"])
        if draw in seen:
            raise ValueError(
                f"sample {row['sample']} of prompt {row['prompt']} by {row['checkpoint']} is there twice; "
                "name each file of responses once"
            )
        seen.add(draw)


def _rewards(samples: Samples, rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """A score for each row; blank responses, which `score` passes over, have none."""
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
