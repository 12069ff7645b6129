"""Answers are compared in processes that can be killed, and each pair once."""

import asyncio
import json
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_post.inference.journal import Journal
from megatron_post.synthesis.math import answers
from megatron_post.synthesis.math.answers import BrokenComparison, MathAnswers
from megatron_post.synthesis.math.tries import (
    boxed_answer,
    known_answer,
    step_verdicts,
    steps_of,
)

pytest.importorskip("math_verify")
PAIRS = [
    ("18", "18", "same"),
    ("18", "18.0", "same"),
    ("1,000", "1000", "same"),
    ("\\frac12", "0.5", "same"),
    ("\\frac{7}{2}", "3\\frac{1}{2}", "same"),
    ("18", "\\$18", "same"),
    ("18", "18\\text{ dollars}", "same"),
    ("x^2 + 2x + 1", "(x+1)^2", "same"),
    ("\\{1, 2\\}", "2, 1", "same"),
    ("5", "x = 5", "same"),
    ("\\text{Tuesday}", "tuesday.", "same"),
    ("18", "26", "different"),
    ("-5", "5", "different"),
    ("(1, 2)", "(2, 1)", "different"),
    ("1/3", "0.33", "different"),
    ("listen", "silent", "different"),
    ("B", "C", "different"),
    ("\\text{no}", "on", "different"),
    ("1000", "1\\,000", "same"),
    ("0", "1 000", "different"),
    ("1", "1 1/2", "different"),
    ("\\frac32", "1 1/2", "same"),
    ("46", "12 34", "unreadable"),
    ("2", "\\log_2 4", "same"),
    ("90^\\circ", "90°", "same"),
    ("5", "€5.", "same"),
    ("2", "2\\text{ hours }30\\text{ minutes}", "unreadable"),
    ("18", "18\\text{ dollars and }50\\text{ cents}", "unreadable"),
    ("5", "5\\text{ or }6\\text{ apples}", "different"),
    ("6, 5", "5\\text{ or }6\\text{ apples}", "same"),
    ("5", "x=5\\text{ cm}, y=3\\text{ cm}", "different"),
    ("5\\text{ cm}", "5\\text{ m}", "unreadable"),
    ("5\\text{ m}^2", "5\\text{ m}", "unreadable"),
    ("5 cm", "5 m", "unreadable"),
    ("1\\text{ apple.}", "1\\mathrm{ Apples}", "same"),
    ("7:30\\text{ a.m.}", "7:30\\text{ p.m.}", "unreadable"),
    ("1001_2", "1001_3", "unreadable"),
    ("1.6 \\times 10^{-19}", "9.1 \\times 10^{-31}", "different"),
    ("1.6 \\times 10^{-19}", "0.16 \\times 10^{-18}", "same"),
    ("0", "\\sin(\\pi)", "same"),
    ("0.07", "7\\%", "same"),
    ("18", "}18", "unreadable"),
    ("18", "1" * 1001, "too long"),
    ("18", "__import__('os')._exit(0)", "different"),
]
BOMBS = ["9^{9^{9^{9}}}", "1000000000!"]


async def _compare(directory: Path, *pairs: tuple[str, str], processes: int = 1) -> list[str]:
    with Journal(directory, 0) as journal:
        math = MathAnswers(journal, processes=processes, seconds=1)
        try:
            return [(await math.compare(*pair))[0] for pair in pairs]
        finally:
            await math.close()


def test_what_is_the_same(tmp_path: Path) -> None:
    pairs = [(wanted, given) for wanted, given, _ in PAIRS]
    found = asyncio.run(_compare(tmp_path, *pairs))
    assert list(zip(pairs, found, strict=True)) == [((a, b), result) for a, b, result in PAIRS]


def test_bombs_end_as_timeouts_and_never_hold_the_event_loop(tmp_path: Path) -> None:
    async def both() -> tuple[list[str], int]:
        compared = asyncio.create_task(_compare(tmp_path, *((bomb, "1") for bomb in BOMBS), ("2", "2.0")))
        ticks = 0
        while not compared.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await compared, ticks

    started = time.monotonic()
    found, ticks = asyncio.run(both())
    assert found == ["timeout"] * len(BOMBS) + ["same"]
    assert ticks > 20 * (time.monotonic() - started)  # of 100 a second


def test_a_pair_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("2", "2.0"), ("2", "3"), (BOMBS[0], "1")]
    expected = asyncio.run(_compare(tmp_path, *pairs))
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert asyncio.run(_compare(tmp_path, *pairs)) == expected == ["same", "different", "timeout"]
    with pytest.raises(BrokenComparison, match="does not start"):
        asyncio.run(_compare(tmp_path, ("2", "4")))


def test_a_process_that_dies_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("print('ready', flush=True); input(); raise SystemExit(1)")
    monkeypatch.setattr("megatron_post.synthesis.math.answers._WORKER", worker)
    assert asyncio.run(_compare(tmp_path, ("1", "2"), ("1", "3"))) == ["crashed", "crashed"]


def test_a_process_obeys_the_limits_of_its_site(tmp_path: Path) -> None:
    worker = [sys.executable, answers.__file__.replace("answers.py", "answers_worker.py"), "5"]
    limited = "ulimit -v 1000000 && ulimit -t 60 && exec " + shlex.join(worker)
    pair = json.dumps(["1", "1.0"])
    found = subprocess.run(["bash", "-c", limited], input=f"{pair}\n", capture_output=True, text=True)
    assert found.stdout == "ready\nsame\n", found.stderr


def test_a_cancelled_comparison_answers_no_other(tmp_path: Path) -> None:
    async def run() -> str:
        with Journal(tmp_path, 0) as journal:
            math = MathAnswers(journal, processes=1)
            try:
                await math.compare("1", "2")
                comparing = asyncio.create_task(math.compare(BOMBS[0], "1"))
                await asyncio.sleep(0.2)
                comparing.cancel()
                await asyncio.gather(comparing, return_exceptions=True)
                return (await math.compare("5", "5.0"))[0]
            finally:
                await math.close()

    assert asyncio.run(run()) == "same"


def test_speed(tmp_path: Path) -> None:
    """Prints how many different pairs of numbers one process compares in a second."""
    pairs = [(str(number), f"{number}.{number % 2}") for number in range(1, 501)]

    async def run() -> tuple[Counter[str], float]:
        with Journal(tmp_path, 0) as journal:
            math = MathAnswers(journal, processes=1)
            try:
                await math.compare("1", "2")  # starts the process
                started = time.monotonic()
                found = await asyncio.gather(*(math.compare(*pair) for pair in pairs))
                return Counter(result for result, _ in found), time.monotonic() - started
            finally:
                await math.close()

    found, seconds = asyncio.run(run())
    print(f"{len(pairs) / seconds:.0f} answers/s")
    assert found == {"same": 250, "different": 250}


def test_the_last_box_is_the_answer() -> None:
    assert boxed_answer("\\boxed{1} and \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert boxed_answer("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    for text in ("", "18", "\\boxed{}", "\\boxed{ }", "\\boxed{18", "\\boxed 18", "\\boxed{{18}"):
        assert boxed_answer(text) is None


def test_known_answers() -> None:
    row = {"a": "3 + 4 = 7\n#### 7", "b": 7, "c": "so \\boxed{7}", "d": "$7$", "e": None}
    assert known_answer(row, "a", "####", key="answer") == "7"
    assert [known_answer(row, name, "", key="answer") for name in "bcde"] == ["7", "7", "7", None]
    assert known_answer(row, "f", "", key="answer") is None
    with pytest.raises(ValueError, match=r"settings\.answer=b: '####' and an answer are not in it"):
        known_answer(row, "b", "####", key="answer")
    with pytest.raises(ValueError, match=r"more than an answer: name .* settings\.answer_after"):
        known_answer(row, "a", "", key="answer")


def test_steps_are_numbered_from_one() -> None:
    text = "Let us see.\n\n## Step 1: add\n3 + 4\n\n## Step 2: answer\nAs step 1 says, 7."
    assert steps_of(text) == ("Let us see.\n\n## Step 1: add\n3 + 4", "## Step 2: answer\nAs step 1 says, 7.")
    assert steps_of("Step 1: add\nStep 2: say") == ("Step 1: add", "Step 2: say")
    assert len(steps_of("## Step 1: add\nStep 1 of 2 is this.")) == 1
    for broken in (
        "",
        "no steps",
        f"Step {'9' * 5000}: add",
        "## Step 2: add",
        "## Step 1: a\n## Step 3: b",
        "## Step 1: a\n## Step 1: b",
    ):
        assert steps_of(broken) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I add.\nStep 1: right\nStep 2: wrong", [True, False]),
        ("Step 1: right\n\nStep 2: right\n", [True, True]),
        ("Step 1: right", None),
        ("Step 1: right\nStep 2: right\nStep 3: right", None),
        ("Step 1: wrong\nStep 1: right\nStep 2: right", None),
        ("Step 2: right\nStep 1: right", None),
        ("Step 1: right\nStep 2: mostly right", None),
        ("Step 1: right\nStep 2: Right", None),
        ("Step 1: right\nStep 2: right\nAll is well.", None),
        ("", None),
        (f"Step 1: right\nStep {'9' * 5000}: right", None),
    ],
)
def test_verdicts_are_read_strictly(text: str, expected: list[bool] | None) -> None:
    assert step_verdicts(text, 2) == expected


def test_math_verify_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with Journal(tmp_path, 0) as journal, pytest.raises(ValueError, match=r"needs math-verify: pip install"):
        MathAnswers(journal)
