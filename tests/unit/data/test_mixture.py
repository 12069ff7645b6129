"""The numbers of uses of rows are compared with hand calculations."""

import hashlib
from typing import Any

import numpy as np
import pytest

from megatron_post.config.data import Source
from megatron_post.data.mixture import mix, shares
from megatron_post.data.permutation import permutation


def source(name: str, **keys: Any) -> Source:
    return Source(name=name, path="nowhere", **keys)


def test_fractional_epochs_repeat_all_and_some_once_more() -> None:
    uses = mix([source("a", epochs=2.5)], {"a": 1000}, seed=1)["a"]
    assert np.bincount(uses).tolist() == [0, 0, 500, 500]


def test_less_than_an_epoch_uses_a_subset_that_grows() -> None:
    some, more = (mix([source("a", epochs=e)], {"a": 100}, seed=1)["a"] for e in (0.2, 0.7))
    assert (some.sum(), more.sum(), some.max()) == (20, 70, 1)
    assert (more >= some).all()


def test_without_epochs_or_weight_each_row_once() -> None:
    assert mix([source("a")], {"a": 5}, seed=1)["a"].tolist() == [1] * 5


def test_weights_use_up_one_source_and_repeat_none() -> None:
    # The scale is min(1000 / 3, 1000 / 1) = 333.3, so a gives 1000 rows and b gives 333. c adds 2 x 200 rows.
    sources = [source("a", weight=3), source("b", weight=1), source("c", epochs=2)]
    uses = mix(sources, {"a": 1000, "b": 1000, "c": 200}, seed=1)
    assert {name: int(count.sum()) for name, count in uses.items()} == {"a": 1000, "b": 333, "c": 400}
    assert uses["a"].max() == uses["b"].max() == 1


def test_the_reports_sft_mix() -> None:
    """With sources of equal size, the shares of the report's Table 7 are met to within one row."""
    weights = {
        "english": 52.66,
        "code": 14.89,
        "multilingual": 3.01,
        "exam": 8.14,
        "reasoning": 21.19,
        "long": 0.11,
    }
    sources = [source(name, weight=weight) for name, weight in weights.items()]
    uses = mix(sources, dict.fromkeys(weights, 10_000), seed=1)
    scale = 10_000 / 52.66
    for name, weight in weights.items():
        assert abs(uses[name].sum() - weight * scale) <= 0.5


def test_a_tiny_weight_keeps_one_row() -> None:
    uses = mix([source("a", weight=1000), source("b", weight=0.1)], {"a": 50, "b": 50}, seed=1)
    assert (uses["a"].sum(), uses["b"].sum()) == (50, 1)


def test_the_draw_depends_on_seed_and_name_alone() -> None:
    alone = mix([source("a", epochs=0.5)], {"a": 64}, seed=1)["a"]
    beside = mix([source("b"), source("a", epochs=0.5)], {"a": 64, "b": 9}, seed=1)["a"]
    other_seed = mix([source("a", epochs=0.5)], {"a": 64}, seed=2)["a"]
    assert np.array_equal(alone, beside)
    assert not np.array_equal(alone, other_seed)


def test_a_weighted_source_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="b has a weight but no usable row"):
        mix([source("a", weight=1), source("b", weight=1)], {"a": 5, "b": 0}, seed=1)


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match=r"name\(s\) a appear more than once"):
        mix([source("a"), source("a")], {"a": 5}, seed=1)


def test_shares_count_repeats() -> None:
    # a uses 2 + 1 rows, which have 2*10 + 1*20 = 40 tokens. b uses one row of 60 tokens.
    realised = shares(["a", "b"], [np.array([2, 1]), np.array([1])], [np.array([10, 20]), np.array([60])])
    assert [(s.rows, s.tokens, s.row_share, s.token_share, s.epochs) for s in realised] == [
        (3, 40, 0.75, 0.4, 1.5),
        (1, 60, 0.25, 0.6, 1.0),
    ]


def test_permutation_is_one_and_fixed_for_ever() -> None:
    assert sorted(permutation(1000, 7, "x").tolist()) == list(range(1000))
    assert not np.array_equal(permutation(1000, 7, "x"), permutation(1000, 7, "y"))
    # A resumed run depends on this order, so it must not change with the version of any library.
    assert permutation(8, 1234, "epoch", 0).tolist() == [7, 5, 4, 1, 3, 2, 0, 6]


def splitmix64(state: int) -> int:
    """SplitMix64 in Python integers, as a reference."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_permutation_sorts_by_splitmix64() -> None:

    key = int.from_bytes(hashlib.blake2b(repr((5, "a")).encode(), digest_size=8).digest(), "little")
    keys = [splitmix64((key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(50)]
    assert permutation(50, 5, "a").tolist() == sorted(range(50), key=keys.__getitem__)
