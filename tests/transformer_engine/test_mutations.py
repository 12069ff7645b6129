"""The comparison of layouts notices a mistake of each kind: here every mistake is made, and must be found.

No mistake ends in an error by itself: each gives a loss and gradients.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from tests.distributed import test_layouts
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import needs_wheel, run_with_transformer_engine

pytestmark = needs_wheel

ALL_HEADS = {
    "model": {"num_key_value_heads": 4}
}  # as many of keys as of queries, so that both have one shape


def _one_norm_without_sequence_parallelism() -> AbstractContextManager[Any]:
    """Its weight's gradient is not summed over the ranks that hold parts of the sequence."""
    build = test_layouts.build_model

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        weight = chunks[0].decoder.layers[1].self_attention.linear_qkv.layer_norm_weight
        assert weight.sequence_parallel
        weight.sequence_parallel = False
        return chunks

    return mock.patch.object(test_layouts, "build_model", mistaken)


def _queries_and_keys_swapped() -> AbstractContextManager[Any]:
    from megatron.core.transformer.attention import SelfAttention

    split = SelfAttention.get_query_key_value_tensors

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        query, key, value = split(*args, **kwargs)
        return key, query, value

    return mock.patch.object(SelfAttention, "get_query_key_value_tensors", mistaken)


def _sequence_not_gathered() -> AbstractContextManager[Any]:
    """A matrix behind a norm takes its own part of the sequence for the others' parts too."""
    from transformer_engine.pytorch.module import layernorm_linear

    def mistaken(x: Any, group: Any, **_: Any) -> Any:
        return x.repeat(group.size(), *[1] * (x.dim() - 1)), None

    return mock.patch.object(layernorm_linear, "gather_along_first_dim", mistaken)


def _keys_not_gathered() -> AbstractContextManager[Any]:
    """A context-parallel rank takes its own keys and values for the others' too."""
    from megatron_post.models import attention

    return mock.patch.object(attention, "gather_sequence", lambda x, _, group: x.repeat(1, group.size(), 1))


def _segments_lost_on_a_middle_stage() -> AbstractContextManager[Any]:
    """The second of four pipeline stages takes a pack for one segment."""
    from megatron_post.train import step

    make = step.transformer_engine_segments

    def mistaken(cu_seqlens: Any, **kwargs: Any) -> Any:
        return make(cu_seqlens[[0, -1]] if os.environ["RANK"] == "1" else cu_seqlens, **kwargs)

    return mock.patch.object(step, "transformer_engine_segments", mistaken)


# mistake -> (ranks, layout, other sections, whether layers are the portable ones)
MISTAKES: dict[Callable[[], AbstractContextManager[Any]], tuple[int, dict, dict, bool]] = {
    _one_norm_without_sequence_parallelism: (2, {"tensor": 2, "sequence": True}, {}, False),
    _queries_and_keys_swapped: (1, {}, ALL_HEADS, False),
    _sequence_not_gathered: (2, {"tensor": 2, "sequence": True}, {}, False),
    _keys_not_gathered: (2, {"context": 2}, {}, True),
    _segments_lost_on_a_middle_stage: (4, {"pipeline": 4}, {}, False),
}


def _mistaken(
    mistake: Callable[[], AbstractContextManager[Any]], parallel: dict, sections: dict, portable: bool
) -> Any:
    with mistake():
        return gradients(parallel, sections, portable=portable)


@pytest.fixture(scope="module")
def expected() -> dict[bool, tuple[dict, float, dict]]:
    """What one rank gives without a mistake: of the usual model, and of the one with all heads."""
    return {bool(sections): joined(run_ranks(gradients, 1, {}, sections)) for sections in ({}, ALL_HEADS)}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_is_noticed(mistake: Callable[[], AbstractContextManager[Any]], expected: Any) -> None:
    world_size, parallel, sections, portable = MISTAKES[mistake]
    found = run_with_transformer_engine(_mistaken, world_size, mistake, parallel, sections, portable)
    with pytest.raises(AssertionError):
        check_equal(joined(found), expected[bool(sections)])
