"""GSM8K's published model solutions, of known correctness, as the replies of the author.

The files are not in the repository: github.com/openai/grade-school-math has them.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.documentation import ROOT
from tests.scripted_server import Body, ScriptedServer
from tests.unit.synthesis.math.conftest import MathPlace

pytest.importorskip("math_verify")
FILE = ROOT.parent / "shared/data/gsm8k/example_model_solutions.jsonl"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_JUDGED = re.compile(r"exactly (\d+) line")
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there")


def _problems() -> list[dict[str, Any]]:
    with FILE.open() as file:
        return [json.loads(line) for line in file]


def _in_steps(solution: str) -> str:
    """A solution in the form that the recipe asks for: a step for each line, and the answer in a box.

    The text of its steps and its answer are as they were. Without an answer it gets no box.
    """
    *lines, last = solution.strip().splitlines()
    is_answer = last.startswith("A: ")
    steps = [f"## Step {n}: go on\n{line}" for n, line in enumerate([*lines, *[last][is_answer:]], start=1)]
    answer = [f"The final answer is: $\\boxed{{{last.removeprefix('A: ')}}}$"][: int(is_answer)]
    return "\n\n".join([*steps, *answer])


class _Author:
    """Replies with the solution of the model that the seed names. As a judge, it finds each step right."""

    def __init__(self, problems: list[dict[str, Any]]) -> None:
        self._solutions = {each["question"]: each for each in problems}

    def __call__(self, body: Body) -> str:
        prompt = body["messages"][0]["content"]
        if judged := _JUDGED.search(prompt):
            return "\n".join(f"Step {number}: right" for number in range(1, int(judged[1]) + 1))
        question = prompt.partition("step by step.\n\n")[2].partition("\n\nBegin each step")[0]
        return _in_steps(self._solutions[question][MODELS[body["seed"]]]["solution"])


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    # 25 questions end in white space, which a recipe removes
    return [{**each, "question": each["question"].strip()} for each in _problems()]


@pytest.fixture
def gsm8k(tmp_path: Path, problems: list[dict[str, Any]]) -> Iterator[MathPlace]:
    with ScriptedServer(_Author(problems)) as server:
        yield MathPlace(tmp_path, server)


def _kept(place: MathPlace) -> set[tuple[str, str]]:
    return {(row["problem"], row["messages"][1]["content"]) for row in place.rows()}


def _texts(problems: list[dict[str, Any]]) -> dict[tuple[str, str], bool]:
    """Whether each different solution of a problem is right, as its publisher says."""
    return {
        (each["question"], _in_steps(each[model]["solution"])): each[model]["is_correct"]
        for each in problems
        for model in MODELS
    }


def _measured(
    name: str, kept: set[tuple[str, str]], right: dict[tuple[str, str], bool]
) -> tuple[float, float]:
    """Precision and recall."""
    true = sum(right[each] for each in kept)
    precision, recall = true / len(kept), true / sum(right.values())
    print(f"{name}: {len(right)} solutions, {len(kept)} kept, precision {precision:.4f}, recall {recall:.4f}")
    return precision, recall


@pytest.mark.slow
def test_known_answers_keep_exactly_the_right_solutions(
    gsm8k: MathPlace, problems: list[dict[str, Any]]
) -> None:
    """Both must be 1.0. Every answer but one is a decimal number, and that one ("-1.8 billion") is wrong.
    math-verify compares numbers up to the sixth decimal, and no wrong one is as near to the right one."""
    rows = [{"problem": each["question"], "answer": each["ground_truth"]} for each in problems]
    started = time.monotonic()
    gsm8k.run("math_solutions", rows, samples=4, answer_after="A:")
    print(f"{len(rows)} problems in {time.monotonic() - started:.1f} s")
    print("answers:", gsm8k.results("answers"), "replies:", gsm8k.results("solve"))
    assert _measured("known answers", _kept(gsm8k), _texts(problems)) == (1.0, 1.0)
    assert gsm8k.results("solve") == {"no final answer": 9, "repeat of another reply": 5}


def test_a_majority_keeps_what_arithmetic_says(gsm8k: MathPlace, problems: list[dict[str, Any]]) -> None:
    """Where no answer is known, two of four solutions must agree, and no other answer may be as frequent.

    Models agree on wrong answers too, so that neither precision nor recall can be 1.0. Which solutions are
    kept follows from exact fractions, without math-verify.
    """
    problems = problems[:300]
    gsm8k.run("math_solutions", [{"problem": each["question"]} for each in problems], samples=4)
    expected = set()
    for each in problems:
        answers = {model: _fraction(each[model]["solution"]) for model in MODELS}
        counts = Counter(answer for answer in answers.values() if answer is not None).most_common(2)
        if counts and counts[0][1] >= 2 and (len(counts) == 1 or counts[1][1] < counts[0][1]):
            agreed = [model for model in MODELS if answers[model] == counts[0][0]]
            expected |= {(each["question"], _in_steps(each[model]["solution"])) for model in agreed}
    assert _kept(gsm8k) == expected
    precision, recall = _measured("majority of four", expected, _texts(problems))
    assert 0.5 < precision < 1.0 and 0.5 < recall < 1.0


def _fraction(solution: str) -> Fraction | None:
    """The answer, exactly. None for what is no number: each of these is alone, or is no majority."""
    _, mark, answer = solution.rpartition("A: ")
    try:
        return Fraction(answer.strip().replace(",", "")) if mark else None
    except ValueError:
        return None
