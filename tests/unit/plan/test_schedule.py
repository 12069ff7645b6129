"""The simulated schedules: megatron-core's order, the known bubbles, and small schedules by hand."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel import schedules

from megatron_post.plan.schedule import Pass, rank_order, simulate


def uniform(rank: int, task: Pass) -> float:
    return 1.0 if task.kind == "forward" else 2.0


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), [
    (2, 1, 4), (4, 1, 8), (8, 1, 64), (4, 1, 2),
    (2, 2, 4), (4, 2, 8), (4, 5, 8), (8, 8, 16), (8, 8, 64),
])  # fmt: skip
def test_bubble_of_equal_passes(pipeline: int, virtual: int, microbatches: int) -> None:
    """The bubble is (p - 1) / (v m + p - 1) of the time, up to rounding."""
    timeline = simulate(uniform, pipeline=pipeline, virtual=virtual, microbatches=microbatches)
    expected = (pipeline - 1) / (virtual * microbatches + pipeline - 1)
    assert timeline.bubble == pytest.approx(expected, rel=1e-9)
    assert timeline.seconds == pytest.approx(3.0 * (virtual * microbatches + pipeline - 1), rel=1e-9)
    assert len(timeline.events) == 2 * pipeline * virtual * microbatches
    shape = {"pipeline": pipeline, "virtual": virtual, "microbatches": microbatches}
    forward = simulate(uniform, **shape, forward_only=True)
    assert forward.seconds == pytest.approx(virtual * microbatches + pipeline - 1, rel=1e-9)
    assert len(forward.events) == pipeline * virtual * microbatches


@pytest.mark.parametrize(
    ("pipeline", "virtual", "microbatches"), [(2, 2, 4), (4, 2, 8), (8, 8, 16), (4, 3, 4)]
)
def test_interleaved_order_is_megatron_cores(pipeline: int, virtual: int, microbatches: int) -> None:
    """megatron-core's own functions give the warm-up and the table of passes.

    A rank goes through the table, and reverses the chunks for its backward passes.
    """
    table = schedules.get_schedule_table(microbatches, virtual, pipeline)
    for rank in range(pipeline):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank),
            virtual_pipeline_model_parallel_size=virtual,
        )
        total, _, warmup, rest = schedules.get_pp_rank_microbatches(
            microbatches, virtual, pipeline, p2p_communicator=communicator
        )
        order = rank_order(rank, pipeline=pipeline, virtual=virtual, microbatches=microbatches)
        assert len(order) == 2 * total
        assert [task.kind for task in order] == (
            ["forward"] * warmup + ["forward", "backward"] * rest + ["backward"] * warmup
        )
        assert [(w.microbatch, w.chunk) for w in order if w.kind == "forward"] == table
        assert [(w.microbatch, virtual - 1 - w.chunk) for w in order if w.kind == "backward"] == table


def test_1f1b_by_hand() -> None:
    """p = 2, m = 2, forward 1, backward 2.

    Rank 0 runs F0 F1 from 0 to 2. It runs B0 after rank 1 has finished its own at 4, and B1 at 7, so it ends
    at 9. Rank 1 runs F0 from 1, B0 from 2, F1 from 4 and B1 from 5 to 7.
    """
    timeline = simulate(uniform, pipeline=2, virtual=1, microbatches=2)
    spans = {(e.rank, e.task.kind[0], e.task.microbatch): (e.start, e.end) for e in timeline.events}
    assert spans[1, "f", 0] == (1, 2) and spans[1, "b", 0] == (2, 4)
    assert spans[1, "f", 1] == (4, 5) and spans[1, "b", 1] == (5, 7)
    assert spans[0, "b", 0] == (4, 6) and spans[0, "b", 1] == (7, 9)


def test_a_slow_last_stage_sets_the_pace() -> None:
    """p = 2, m = 4, and the last stage takes 1 second longer.

    It runs without a gap from 1 to 1 + 4 x (1 + 2 + 1). Rank 0's last backward pass then takes 2.
    """
    timeline = simulate(
        lambda rank, task: uniform(rank, task) + (rank == 1 and task.kind == "backward"),
        pipeline=2,
        virtual=1,
        microbatches=4,
    )
    assert timeline.seconds == pytest.approx(1 + 16 + 2)


def test_packs_of_unequal_cost() -> None:
    """On one rank times add up. On two ranks the long pack delays the passes after it."""
    costs = [1.0, 3.0, 1.0, 1.0]
    alone = simulate(lambda _, task: costs[task.microbatch], pipeline=1, virtual=1, microbatches=4)
    assert alone.seconds == pytest.approx(12) and alone.bubble == pytest.approx(0)
    two = simulate(lambda _, task: costs[task.microbatch], pipeline=2, virtual=1, microbatches=4)
    equal = simulate(lambda _, task: 1.5, pipeline=2, virtual=1, microbatches=4)
    assert two.busy(0) == pytest.approx(equal.busy(0)) and two.seconds > equal.seconds


def test_transfers_delay_the_next_stage() -> None:
    """One microbatch through two stages: forward 1, transfer, forward 1, backward 2, transfer, backward 2."""
    timeline = simulate(uniform, pipeline=2, virtual=1, microbatches=1, transfer=0.5)
    assert timeline.seconds == pytest.approx(7.0)


def test_in_flight() -> None:
    """1F1B holds p - r microbatches on rank r.

    The interleaved schedule holds 2 (p - r - 1) + (v - 1) p + 1 passes.
    """
    for rank in range(4):
        assert _most_in_flight(rank_order(rank, pipeline=4, virtual=1, microbatches=8)) == 4 - rank
        interleaved = rank_order(rank, pipeline=4, virtual=2, microbatches=8)
        assert _most_in_flight(interleaved) == 2 * (3 - rank) + 4 + 1
    assert _most_in_flight(rank_order(0, pipeline=8, virtual=1, microbatches=2)) == 2


def _most_in_flight(order: list[Pass]) -> int:
    return max(accumulate(1 if task.kind == "forward" else -1 for task in order))


def test_interleaving_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"6 microbatches are not a multiple of parallel.pipeline=4"):
        rank_order(0, pipeline=4, virtual=2, microbatches=6)
