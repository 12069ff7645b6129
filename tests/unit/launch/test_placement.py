"""The placement of ranks agrees with megatron-core's groups."""

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_post.config.sections import Parallel
from megatron_post.launch.placement import Placement, fewest_nodes, place


@pytest.mark.parametrize(
    ("tensor", "context", "data", "pipeline"), [(2, 2, 3, 4), (8, 1, 2, 2), (1, 1, 4, 1), (4, 2, 1, 2)]
)
def test_groups_equal_those_of_megatron_core(tensor: int, context: int, data: int, pipeline: int) -> None:
    placement = Placement(tensor, context, data, pipeline, ranks_per_node=8)
    theirs = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    for axis in placement.axes():
        expected = sorted(map(list, theirs.get_ranks(axis.lower())))
        assert sorted(list(group) for group in placement.groups(axis)) == expected
        for group in expected:
            for rank in group:
                assert list(placement.group(axis, rank)) == group


def test_tensor_parallel_stays_inside_a_node() -> None:
    """TP 8 fits in a node of 8 ranks. TP 8 on nodes of 4 and TP 2 on nodes of 3 would cross nodes."""
    assert not Placement(8, 1, 2, 1, ranks_per_node=8).errors()
    (error,) = Placement(8, 1, 1, 1, ranks_per_node=4).errors()
    assert "parallel.tensor=8 does not divide the 4 ranks of a node" in error
    assert Placement(2, 1, 3, 1, ranks_per_node=3).errors()


def test_fewest_nodes() -> None:
    """405B needs 8 x 8 x 8 ranks, which are 64 nodes. Two replicas of 12 ranks fill 3 nodes of 8 ranks."""
    assert fewest_nodes(Parallel(tensor=8, pipeline=8, context=8), ranks_per_node=8) == 64
    assert fewest_nodes(Parallel(tensor=4, pipeline=3), ranks_per_node=8) == 3
    assert place(Parallel(tensor=4, pipeline=3), nodes=3, ranks_per_node=8).data == 2
    assert fewest_nodes(Parallel(tensor=2), ranks_per_node=8) == 1


def test_summary() -> None:
    """TP 2 x DP 2 x PP 2 on two nodes of 4 has one stage per node, so PP crosses nodes and DP does not."""
    lines = Placement(2, 1, 2, 2, ranks_per_node=4).summary()
    assert lines == [
        "TP 2: inside a node, ranks 0, 1, ...",
        "DP 2: inside a node, ranks 0, 2, ...",
        "PP 2: over 2 nodes, ranks 0, 4, ...",
        "node 0: ranks 0-3  TP 0-1  DP 0-1  PP 0",
        "node 1: ranks 4-7  TP 0-1  DP 0-1  PP 1",
    ]
    assert len(Placement(8, 8, 32, 8, ranks_per_node=8).summary(max_nodes=8)) == 4 + 8 + 1
