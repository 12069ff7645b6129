"""Accuracy and its interval."""

import pytest

from megatron_post.demo.evaluate import Response, accuracy
from megatron_post.demo.task import make_problems
from megatron_post.rounds.accuracy import Accuracy


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),  # mirror of 0 of 20
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=6e-5)


def test_accuracy_counts_right_answers_in_the_right_form() -> None:
    problems = make_problems(4, side="held_out", seed=0)
    texts = [problems[0].solution, f"The answer is {problems[1].answer + 1}.", f"{problems[2].answer}", ""]
    responses = [Response([1], [2], text) for text in texts]
    assert accuracy(problems, responses) == Accuracy(1, 4)


def test_accuracy_reads_as_percent() -> None:
    assert str(Accuracy(81, 263)) == "30.8% (25.5 to 36.6)"
