"""`megatron-post select`: of K responses a prompt, the best to train on, and the best beside the worst."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.data import Rating
from megatron_post.config.section import Name, NonNegative, Section, Whole
from megatron_post.data.row_refusals import template_mark
from megatron_post.inference.failures import failed_prompts, read_failures
from megatron_post.inference.prompts import Prompt, read_prompts
from megatron_post.inference.request import messages_as_json
from megatron_post.inference.samples import read_samples
from megatron_post.rounds.cleaning import Found, balance, load_rules
from megatron_post.rounds.verifier import Verdict, VerifierSettings, verify
from megatron_post.storage.files import read_lines, write_json, write_lines

SFT, PREFERENCES, SUMMARY = "sft.jsonl", "preferences.jsonl", "selection.json"


# what has an effect in a `Selection`
SELECTION_NEEDS = (
    Needs("verifier_weight", "verifier"),
    Needs("only_correct", "verifier"),
    Needs("train_edited", "verifier"),
    Needs("seed", "cleaning"),
)


class Samples(Section):
    """One file that `generate` wrote, and what `score` wrote about it."""

    responses: Name = Field(description="what `generate` wrote")
    scores: Name | None = Field(None, description="what `score` wrote about it; null: the verifier selects")


class Selection(Section):
    """How responses are chosen."""

    verifier: VerifierSettings | None = None
    verifier_weight: NonNegative = Field(
        10.0, description="added to the reward score of what the verifier finds right"
    )
    tie: NonNegative = Field(0.0, description="scores no further apart are equal")
    only_correct: bool = Field(True, description="with a verifier: train SFT on right responses alone")
    train_edited: bool = Field(
        False, description="where no response is right: train SFT on what the verifier makes of it"
    )
    ratings: dict[Rating, NonNegative] = Field(
        default={
            "marginally_better": 0.0,
            "slightly_better": 0.5,
            "better": 1.0,
            "significantly_better": 2.0,
        },
        description="least margin of each rating",
    )
    cleaning: Name | None = Field(None, description="YAML file of rules for the SFT set")
    seed: Whole = Field(0, description="of the draw among rows that a cleaning rule finds too often")


class Select(Selection):
    """A selection file."""

    prompts: Name = Field(description="the file of prompts that `generate` has answered")
    samples: tuple[Samples, ...] = Field(min_length=1)
    max_bad_rows: Whole = Field(0, description="of the prompts, as in `generate`")

    @model_validator(mode="after")
    def _can_rank(self) -> "Select":
        errors = without_effect(self, SELECTION_NEEDS)
        scored = [s.scores is not None for s in self.samples]
        if not any(scored) and self.verifier is None:
            errors.append("without scores and without a verifier there is nothing to select by")
        if any(scored) != all(scored):
            errors.append("either all samples have scores or none")
        if errors:
            raise ValueError("\n".join(errors))
        return self


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


def select(settings: Select, directory: str | Path) -> dict[str, Any]:
    """Write `sft.jsonl` (the best response of each prompt), `preferences.jsonl` (the best over the worst;
    edited over both where all are wrong and the verifier knows better) and `selection.json`, whose content is
    returned.

    Every row has its provenance. Raises `ValueError` for files that do not belong together.
    """
    target = Path(directory)
    by_prompt = candidates(settings)
    chosen = [best_of(found, tie=settings.tie) for found in by_prompt.values()]
    rows = [
        row
        for (best, tied), found in zip(chosen, by_prompt.values(), strict=True)
        if best is not None and (row := _sft_row(best, len(found), tied, settings)) is not None
    ]
    rules = () if settings.cleaning is None else load_rules(settings.cleaning)
    kept, cleaned = balance([row["messages"][-1]["content"] for row in rows], rules, seed=settings.seed)
    sft = [rows[i] for i in kept]
    preferences = [
        row
        for (best, _), found in zip(chosen, by_prompt.values(), strict=True)
        if (row := preference(best, found, settings)) is not None
    ]
    if not sft and not preferences:
        raise ValueError(
            f"of {len(by_prompt)} prompts none has a response to train on nor two to compare; look at "
            f"{settings.samples[0].responses}: are they blank, cut off at max_tokens, or all wrong?"
        )
    write_lines(target / SFT, sft)
    write_lines(target / PREFERENCES, preferences)
    failures = [row for samples in settings.samples for row in read_failures(Path(samples.responses))]
    summary = {"failed": failed_prompts(failures)}
    summary |= _summary(by_prompt, chosen, sft, preferences, cleaned)
    write_json(target / SUMMARY, summary)
    return summary


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


def _sft_row(best: Candidate, of: int, tied: int, settings: Select) -> dict[str, Any] | None:
    """The best of a prompt as a dialog to train on; the verifier's where that is wanted and the best is
    wrong."""
    verdict = best.verdict
    if verdict is None or verdict.correct or not settings.only_correct:
        return _trains(best, best.text, best.provenance() | {"of": of, "tied": tied})
    if settings.train_edited and verdict.edited:
        return _trains(best, verdict.edited, {"prompt": best.row["prompt"], "by": "verifier"})
    return None


def _trains(best: Candidate, text: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """A row that trains `text` alone. Earlier responses are part of the prompt: nobody selected them."""
    context = [m | {"weight": 0} if m["role"] == "assistant" else m for m in best.row["messages"][:-1]]
    return {"messages": [*context, *_said(text)], "provenance": provenance}


def preference(best: Candidate | None, found: Sequence[Candidate], settings: Select) -> dict[str, Any] | None:
    """The best over the worst, which comes from another checkpoint where one of those is worse; None where
    there is nothing to prefer.

    Where the best is wrong and the verifier knows a right response, that one is `edited`; where all tie, it
    is `chosen` over the worst.
    """
    others = [c for c in found if c.text and best and c.text != best.text and not c.is_templated]
    if best is None or not others:
        return None
    elsewhere = [c for c in others if c.row["checkpoint"] != best.row["checkpoint"]]
    worse = [c for c in elsewhere if best.score - c.score > settings.tie]
    worst = min(worse or others, key=lambda c: c.score)
    margin = best.score - worst.score
    mended = None
    if best.verdict is not None and not best.verdict.correct and best.verdict.edited not in (None, ""):
        mended = best.verdict.edited
    row: dict[str, Any] = {"prompt": best.row["messages"][:-1], "rejected": _said(worst.text)}
    provenance: dict[str, Any] = {"rejected": worst.provenance(), "margin": margin}
    if margin > settings.tie:
        row |= {"chosen": _said(best.text), "rating": rating(margin, settings.ratings)}
        provenance["chosen"] = best.provenance()
        if mended is not None:
            row["edited"] = _said(mended)
    elif mended is not None:
        row |= {"chosen": _said(mended), "rating": "significantly_better"}
        provenance["chosen"] = {"prompt": best.row["prompt"], "by": "verifier"}
    else:
        return None
    texts = [row[name][0]["content"] for name in ("chosen", "rejected", "edited") if name in row]
    return row | {"provenance": provenance} if len(set(texts)) == len(texts) else None


def rating(margin: float, ratings: dict[Rating, NonNegative]) -> Rating | None:
    """The strongest rating whose least margin is reached; None below all of them."""
    strongest_first = [name for name in get_args(Rating) if name in ratings]
    return next((name for name in strongest_first if margin >= ratings[name]), None)


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


def _summary(
    by_prompt: dict[int, list[Candidate]],
    chosen: Sequence[tuple[Candidate | None, int]],
    sft: Sequence[dict[str, Any]],
    preferences: Sequence[dict[str, Any]],
    cleaned: Sequence[Found],
) -> dict[str, Any]:
    every = [candidate for found in by_prompt.values() for candidate in found]
    best = [candidate for candidate, _ in chosen if candidate is not None]
    known = [c.verdict.correct for c in every if c.verdict is not None]
    known_best = [c.verdict.correct for c in best if c.verdict is not None]
    return {
        "prompts": len(by_prompt),
        "responses": len(every),
        "blank": sum(not c.text for c in every),
        "cut_off": sum(c.row["finish"] not in ("stop", "tool_calls") for c in every),
        "templated": sum(c.is_templated for c in every),
        "tool_calls": sum(c.row["finish"] == "tool_calls" for c in every),
        "without_a_whole_response": len(chosen) - len(best),
        "ties": sum(tied > 0 for _, tied in chosen),
        "correct": sum(known) if known else None,
        "best_correct": sum(known_best) if known_best else None,
        "sft_rows": len(sft),
        "sft_edited": sum("by" in row["provenance"] for row in sft),
        "preferences": len(preferences),
        "edited": sum("edited" in row for row in preferences),
        "cleaning": [asdict(found) for found in cleaned],
        "rewards": [c.reward for c in every if c.reward is not None],
        "selected_lengths": [c.row["tokens"] for c in best],
        "rejected_lengths": list(_other_lengths(by_prompt, best)),
        "margins": [row["provenance"]["margin"] for row in preferences],
    }


def _other_lengths(by_prompt: dict[int, list[Candidate]], best: Sequence[Candidate]) -> Iterator[int]:
    selected = {id(candidate) for candidate in best}
    for found in by_prompt.values():
        yield from (c.row["tokens"] for c in found if id(c) not in selected)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
