"""Lists of rewards against hand calculations."""

import math

import pytest

from megatron_post.config.load import ConfigError, parse
from megatron_post.config.rewards import (
    Reward,
    check_capabilities,
    combine,
    list_errors,
    models_of,
    score_of,
)


def _reward(**values: object) -> Reward:
    return parse(Reward, {"name": "r", "models": ["a"], **values}, origin="reward")


def test_mean_and_minimum_of_an_ensemble() -> None:
    """The scores 1 and 4 have the mean 2.5 and the minimum 1. A blank response has no reward."""
    scores = [[[1.0, None, 3.0], [4.0, None, 2.0]]]
    mean = combine([_reward(models=["a", "b"])], scores, ["", "", ""])
    least = combine([_reward(models=["a", "b"], combine="min")], scores, ["", "", ""])
    assert [total and total.value for total in mean] == [2.5, None, 2.5]
    assert [total and total.value for total in least] == [1.0, None, 2.0]


def test_standardized_scores() -> None:
    """1, 3 and 5 have the mean 3 and the variance 8/3. The other model's scores are those, times 10 plus 7.

    Without standardization its scale decides the mean. With it, both models agree.
    """
    scores = [[[1.0, 3.0, 5.0], [17.0, 37.0, 57.0]]]
    found = combine([_reward(models=["a", "b"], combine="min", standardize=True)], scores, [""] * 3)
    expected = [-2 / math.sqrt(8 / 3), 0.0, 2 / math.sqrt(8 / 3)]
    assert [total.value for total in found if total] == pytest.approx(expected, abs=1e-12)
    equal = combine([_reward(standardize=True)], [[[2.0, 2.0]]], ["", ""])
    assert [total.value for total in equal if total] == [0.0, 0.0]


def test_weights_and_thresholds_by_capability() -> None:
    """Helpfulness counts 1, and safety 3 for the capability safety, where it must be at least 0.5.

    Chat: 2 + 0 * 0.1 = 2. Safety: 2 + 3 * 0.1 = 2.3, below the threshold.
    """
    rewards = [
        _reward(name="helpful"),
        _reward(name="safe", models=["s"], weight={"safety": 3}, at_least={"safety": 0.5}),
    ]
    chat, safety, passed = combine(
        rewards, [[[2.0, 2.0, 1.0]], [[0.1, 0.1, 0.5]]], ["chat", "safety", "safety"]
    )
    assert chat is not None and safety is not None and passed is not None
    assert (chat.value, chat.below) == (2.0, ())
    assert safety.value == pytest.approx(2.3) and safety.below == ("safe",)
    assert safety.parts == {"helpful": 2.0, "safe": 0.1}
    assert passed.value == pytest.approx(2.5) and not passed.below


def test_default_is_that_of_other_capabilities() -> None:
    reward = _reward(weight={"math": 2.0, "default": 0.5}, at_least={"default": -1.0})
    assert (reward.weight_of("math"), reward.weight_of("code"), reward.weight_of("")) == (2.0, 0.5, 0.5)
    assert reward.least_of("math") == -1.0
    assert _reward(weight={"math": 1.0}).weight_of("code") == 0 and _reward().least_of("math") is None
    with pytest.raises(ValueError, match="no entry has a weight for the capability 'code'"):
        combine([_reward(weight={"math": 1.0})], [[[1.0]]], ["code"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"combine": "min"}, "combine=min has no effect with one model"),
        ({"separator": "\n"}, "separator has no effect without of_steps"),
        ({"weight": 0}, "neither a weight nor a threshold"),
        ({"weight": {}}, "neither a weight nor a threshold"),
        ({"weight": -1}, "weight"),
        ({"at_least": float("nan")}, "at_least"),
        ({"models": []}, "models"),
        ({"models": ["a", "a"]}, "models"),
        ({"of_steps": "max"}, "of_steps"),
        ({"wieght": 2}, "wieght"),
    ],
)
def test_wrong_values(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _reward(**values)


def test_errors_of_a_list() -> None:
    steps = {"models": ["p"], "of_steps": "min"}
    rewards = [_reward(name="x", **steps), _reward(name="x"), _reward(name="y", separator="\n", **steps)]
    assert list_errors(rewards) == [
        "reward: 'x' is there twice; names must be unique",
        "reward 'y': p has another separator elsewhere in the list",
    ]
    assert models_of(rewards[:2]) == {"p": "\n\n", "a": None}


def test_capabilities_that_no_prompt_has() -> None:
    rewards = [_reward(weight={"mtah": 1.0, "default": 1.0})]
    with pytest.raises(ValueError, match=r"no prompt of p.jsonl has the capability 'mtah'.*math"):
        check_capabilities(rewards, {"math", ""}, origin="p.jsonl")
    check_capabilities([_reward(weight={"math": 1.0})], {"math"}, origin="p.jsonl")


@pytest.mark.parametrize(
    ("line", "of_steps", "found"),
    [
        ({"scores": [0.5]}, None, 0.5),
        ({"steps": [[0.9, 0.5]], "min": [0.5], "product": [0.45], "last": [0.5]}, "product", 0.45),
        ({"steps": [[0.9]], "min": [0.9]}, None, "the model scores steps, so its entry"),
        ({"scores": [0.5]}, "min", "the model scores responses, so leave out of_steps"),
        ({"scores": [0.5, 0.6]}, None, "no score of one response"),
        ({"scores": [float("nan")]}, None, "no score of one response"),
        ({"scores": [True]}, None, "no score of one response"),
        ({"scores": ["0.5"]}, None, "no score of one response"),
        ({}, None, "no score of one response"),
        ([1], None, "no score of one response"),
    ],
)
def test_scores_of_lines(line: dict, of_steps: str | None, found: float | str) -> None:
    reward = _reward(of_steps=of_steps)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            score_of(line, reward, origin="scores.jsonl")
    else:
        assert score_of(line, reward, origin="scores.jsonl") == found
