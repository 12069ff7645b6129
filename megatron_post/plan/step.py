"""Time of an optimizer step: the simulated pipeline, and the time outside it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_post.plan.activations import Segment
from megatron_post.plan.adapters import trained_parameters
from megatron_post.plan.schedule import Timeline, simulate
from megatron_post.plan.shape import Chunk, chunks, layer_matrices
from megatron_post.plan.timing import Costs, PassTime


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    passes: the seconds that the busiest rank computes, by kind. The other seconds are outside the pipeline.
    """

    timeline: Timeline
    busiest: int
    passes: PassTime
    reduce_gradients: float
    gather_parameters: float
    update: float
    reference: float
    stragglers: float

    @property
    def seconds(self) -> float:
        return self.timeline.seconds + sum(self.around)

    @property
    def around(self) -> tuple[float, ...]:
        """Seconds outside the pipeline."""
        return self.reduce_gradients, self.gather_parameters, self.update, self.reference, self.stragglers


def step_time(costs: Costs, packs: Sequence[Sequence[Segment]]) -> StepTime:
    """The time of a step. packs: of one data-parallel rank, each of `pack_length` tokens."""
    config, p = costs.config, costs.config.parallel
    parts = chunks(config)
    distinct = {pack: number for number, pack in enumerate(dict.fromkeys(map(tuple, packs)))}
    numbers = [distinct[tuple(pack)] for pack in packs]
    table = {
        (c, pack, kind): costs.chunk(c, segments, kind)
        for c in {_without_place(c) for rank in parts for c in rank}
        for segments, pack in distinct.items()
        for kind in ("forward", "backward")
    }
    times = {
        (c.rank, c.number, pack, kind): table[_without_place(c), pack, kind]
        for rank in parts
        for c in rank
        for pack in distinct.values()
        for kind in ("forward", "backward")
    }
    seconds = {key: time.total for key, time in times.items()}

    def schedule(*, forward_only: bool) -> Timeline:
        return simulate(
            lambda rank, task: seconds[rank, task.chunk, numbers[task.microbatch], task.kind],
            pipeline=p.pipeline,
            virtual=p.virtual_pipeline,
            microbatches=len(packs),
            transfer=costs.transfer(),
            forward_only=forward_only,
        )

    timeline = schedule(forward_only=False)
    busiest = max(range(p.pipeline), key=timeline.busy)
    counts = Counter(
        (busiest, e.task.chunk, numbers[e.task.microbatch], e.task.kind)
        for e in timeline.events
        if e.rank == busiest
    )
    passes = sum((times[key] * count for key, count in counts.items()), PassTime())
    around = around_the_pipeline(costs, parts, passes=passes.total, microbatches=len(packs))
    reference = schedule(forward_only=True).seconds if config.runs_reference else 0.0
    nodes = max(1.0, costs.data_size * p.model_size / costs.gpu.per_node)
    alone = timeline.seconds + sum(around) + reference
    stragglers = alone * costs.gpu.scale_cost * math.log2(nodes)
    return StepTime(timeline, busiest, passes, *around, reference, stragglers)


def _without_place(chunk: Chunk) -> Chunk:
    """The chunk without its place. It is equal for all chunks whose passes take equally long."""
    return replace(chunk, rank=0, number=0)


def around_the_pipeline(
    costs: Costs, parts: list[list[Chunk]], *, passes: float, microbatches: int
) -> tuple[float, float, float]:
    """Seconds of the reduce-scatter of gradients, the all-gather of parameters, and Adam.

    passes: seconds that the busiest rank computes. With `optimizer.overlap` the collectives run beside the
    last and the first microbatches. In the interleaved schedule these are groups of `pipeline` microbatches.
    A third of their time is forward and two thirds are backward. The first chunk's parameters may be gathered
    beside the update of the others.
    """
    config, p = costs.config, costs.config.parallel
    largest = max(sum(trained_parameters(config, c) for c in rank) for rank in parts)
    ranks = costs.data_size * p.context
    reduce = costs.collective(costs.software.gradient_bytes * largest, ranks, spacing=p.tensor)
    gathered = 2 * largest
    if config.precision.fp8_param_gather:
        gathered -= max(sum(c.layers for c in rank) for rank in parts) * sum(layer_matrices(config).values())
    gather = costs.collective(gathered, ranks, spacing=p.tensor)
    # Adam reads gradient, master and moments and writes master, moments and parameter, 30 bytes. Moments in
    # bf16 are copied to fp32 before, and back after, which is 12 bytes each. Buffers are then zeroed.
    traffic = 54 if config.optimizer.moments == "bf16" else 30
    update = (traffic * largest / ranks + 4 * largest) / (
        costs.gpu.memory_bandwidth * costs.gpu.bandwidth_efficiency
    )
    if config.optimizer.overlap_param_gather_with_optimizer_step:
        first = 1 / p.virtual_pipeline
        gather -= min(gather * first, update * (1 - first))
    if config.optimizer.overlap:
        window = passes * min(1.0, (p.pipeline if p.virtual_pipeline > 1 else 1) / microbatches)
        reduce, gather = max(0.0, reduce - window * 2 / 3), max(0.0, gather - window / 3)
    return reduce, gather, update
