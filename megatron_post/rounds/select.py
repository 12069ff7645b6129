"""`megatron-post select` chooses the best of K responses for SFT, and the best and the worst for DPO."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from megatron_post.config.data import Rating
from megatron_post.config.rewards import check_capabilities
from megatron_post.config.section import NonNegative
from megatron_post.curation.rules import RuleCounts, balance, load_response_rules
from megatron_post.inference.failures import failed_prompts, read_failures
from megatron_post.inference.prompts import read_prompts
from megatron_post.rounds.candidates import Candidate, best_of, candidates
from megatron_post.rounds.select_settings import Select
from megatron_post.storage.files import write_json, write_lines

SFT, PREFERENCES, SUMMARY = "sft.jsonl", "preferences.jsonl", "selection.json"


def select(settings: Select, directory: str | Path) -> dict[str, Any]:
    """Write `sft.jsonl`, `preferences.jsonl` and `selection.json`. Returns the content of the last one.

    `sft.jsonl` has the best response to each prompt. `preferences.jsonl` has the best and the worst response,
    and an edited one if the best is wrong and the verifier has a solution. Every row has its provenance.
    Raises `ValueError` for files that do not belong together.
    """
    target = Path(directory)
    by_prompt = candidates(settings)
    chosen = [best_of(found, tie=settings.tie) for found in by_prompt.values()]
    rows = [
        row
        for (best, tied), found in zip(chosen, by_prompt.values(), strict=True)
        if best is not None and (row := _sft_row(best, len(found), tied, settings)) is not None
    ]
    rules = () if settings.cleaning is None else load_response_rules(settings.cleaning)
    kept, cleaned = balance([row["messages"][-1]["content"] for row in rows], rules, seed=settings.seed)
    sft = [rows[i] for i in kept]
    preferences = [
        row
        for (best, _), found in zip(chosen, by_prompt.values(), strict=True)
        if (row := preference(best, found, settings)) is not None
    ]
    if not sft and not preferences:
        raise ValueError(
            f"none of {len(by_prompt)} prompts has a response to train on or two to compare; check whether "
            f"those in {settings.samples[0].responses} are blank, cut off at max_tokens, or all wrong"
        )
    write_lines(target / SFT, sft)
    write_lines(target / PREFERENCES, preferences)
    failures = [row for samples in settings.samples for row in read_failures(Path(samples.responses))]
    summary = {"failed": failed_prompts(failures)}
    summary |= _summary(by_prompt, chosen, sft, preferences, cleaned)
    write_json(target / SUMMARY, summary)
    return summary


def select_file(settings: Select, directory: str | Path) -> dict[str, Any]:
    """As `select`. Also raises `ValueError` if `reward` names a capability that no prompt has.

    A round checks this for all its files of prompts together, because one of them may lack a capability.
    """
    prompts = read_prompts(settings.prompts, max_bad_rows=settings.max_bad_rows)
    check_capabilities(settings.reward, {p.capability for p in prompts}, origin=settings.prompts)
    return select(settings, directory)


def _sft_row(best: Candidate, of: int, tied: int, settings: Select) -> dict[str, Any] | None:
    """The best response as a dialog for SFT, or None.

    If it is wrong, the verifier's solution is used with `train_edited`.
    """
    verdict = best.verdict
    if verdict is None or verdict.correct or not settings.only_correct:
        return _training_row(best, best.text, best.provenance() | {"of": of, "tied": tied})
    if settings.train_edited and verdict.edited:
        return _training_row(best, verdict.edited, {"prompt": best.row["prompt"], "by": "verifier"})
    return None


def _training_row(best: Candidate, text: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """A row that trains only `text`. Earlier responses are part of the prompt and were not selected."""
    context = [m | {"weight": 0} if m["role"] == "assistant" else m for m in best.row["messages"][:-1]]
    return {"messages": [*context, *_assistant_message(text)], "provenance": provenance}


def preference(best: Candidate | None, found: Sequence[Candidate], settings: Select) -> dict[str, Any] | None:
    """A preference of the best response over the worst, or None if there is none.

    The worst one is a response with a reward below its threshold, if there is one. Otherwise it is from
    another checkpoint if that has a worse response. If the best is wrong and the
    verifier has a solution, the solution is `edited`. If all responses tie, the solution is `chosen`.
    """
    others = [c for c in found if c.text and best and c.text != best.text and not c.is_templated]
    if best is None or not others:
        return None
    elsewhere = [c for c in others if c.row["checkpoint"] != best.row["checkpoint"]]
    worse = [c for c in elsewhere if best.score - c.score > settings.tie]
    below = [c for c in others if c.is_below]
    worst = min(below or worse or others, key=lambda c: c.score)
    margin = best.score - worst.score
    mended = None
    if best.verdict is not None and not best.verdict.correct and best.verdict.edited not in (None, ""):
        mended = best.verdict.edited
    row: dict[str, Any] = {"prompt": best.row["messages"][:-1], "rejected": _assistant_message(worst.text)}
    provenance: dict[str, Any] = {"rejected": worst.provenance(), "margin": margin}
    if margin > settings.tie or below:
        # A threshold decides more than a margin does, which may even be negative there.
        label = get_args(Rating)[0] if below else rating(margin, settings.ratings)
        row |= {"chosen": _assistant_message(best.text), "rating": label}
        provenance["chosen"] = best.provenance()
        if mended is not None:
            row["edited"] = _assistant_message(mended)
    elif mended is not None:
        row |= {"chosen": _assistant_message(mended), "rating": "significantly_better"}
        provenance["chosen"] = {"prompt": best.row["prompt"], "by": "verifier"}
    else:
        return None
    texts = [row[name][0]["content"] for name in ("chosen", "rejected", "edited") if name in row]
    return row | {"provenance": provenance} if len(set(texts)) == len(texts) else None


def rating(margin: float, ratings: dict[Rating, NonNegative]) -> Rating | None:
    """The strongest rating whose least margin is reached, or None below all of them."""
    strongest_first = [name for name in get_args(Rating) if name in ratings]
    return next((name for name in strongest_first if margin >= ratings[name]), None)


def _summary(
    by_prompt: dict[int, list[Candidate]],
    chosen: Sequence[tuple[Candidate | None, int]],
    sft: Sequence[dict[str, Any]],
    preferences: Sequence[dict[str, Any]],
    cleaned: Sequence[RuleCounts],
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
        "below_threshold": sum(c.is_below for c in every),
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


def _assistant_message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
