"""Preferences among a model's own answers, as a program ranks them: right ones first, then worked ones."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_post.demo.evaluate import Response, answer_with_transformers
from megatron_post.demo.task import Problem, check_answer, shows_working

SAMPLES = 4
_TEMPERATURE = 1.0
_PROCESSES = 2


def write_preferences(
    model: Path, problems: Sequence[Problem], directory: Path, *, held_out: float, seed: int
) -> int:
    """Sample answers of the model in a Hugging Face directory, rank them, and write those that differ.

    `train.jsonl` and `held_out.jsonl` in `directory` hold rows of prompt, rejected, chosen and at times
    edited; the last `held_out` share of the problems is held out. Returns the number of rows.
    """
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        drawn = [
            pool.submit(answer_with_transformers, model, problems, temperature=_TEMPERATURE, seed=seed + i)
            for i in range(SAMPLES)
        ]
        samples = [future.result() for future in drawn]
    rows = [preference(problem, [s[i].text for s in samples]) for i, problem in enumerate(problems)]
    cut = round(len(rows) * (1 - held_out))
    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, part in (("train", rows[:cut]), ("held_out", rows[cut:])):
        kept = [row for row in part if row is not None]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        count += len(kept)
    return count


def preference(problem: Problem, answers: Sequence[str]) -> dict[str, Any] | None:
    """The best of the answers over the worst, and the problem's own solution, `edited`, over a best that
    falls short of it.

    An answer is worth 2 where it is right and worked, 1 where it is right, 0 where it is wrong. Where all
    are worth the same and fall short, the solution is `chosen`. None where there is nothing to prefer.
    """
    worth = {text.strip(): _worth(problem, text) for text in answers if text.strip()}
    if not worth or min(worth.values()) == 2:
        return None
    best, worst = max(worth, key=worth.__getitem__), min(worth, key=worth.__getitem__)
    row: dict[str, Any] = {"prompt": list(problem.messages), "rejected": _said(worst)}
    if worth[best] == worth[worst]:
        return row | {"chosen": _said(problem.solution)}
    row["chosen"] = _said(best)
    return row if worth[best] == 2 else row | {"edited": _said(problem.solution)}


def working_share(responses: Sequence[Response]) -> float:
    """Share of the responses that show their working."""
    return sum(shows_working(response.text) for response in responses) / len(responses)


def metric_of_run(run_dir: Path, name: str, *, kind: str) -> tuple[float, float]:
    """A metric at the first and the last step that reported it. kind: "train" or "eval"."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    values = [line[name] for line in lines if line["kind"] == kind and name in line]
    return values[0], values[-1]


def _worth(problem: Problem, text: str) -> int:
    return 1 + shows_working(text) if check_answer(problem, text) else 0


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
