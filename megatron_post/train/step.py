"""One optimizer step's worth of forward and backward through megatron-core's schedules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_post.data.batch import PackedBatch
from megatron_post.data.store import Pack
from megatron_post.models.packing import portable_segments, transformer_engine_segments
from megatron_post.parallel.context import zigzag_indices
from megatron_post.parallel.topology import Topology
from megatron_post.stages.base import Metrics, Stage


@dataclass(frozen=True)
class Microbatch:
    """This rank's part of a pack, and what the layers need to know of the whole."""

    batch: PackedBatch
    packed: PackedSeqParams


class Stepper:
    """Runs packs forward, or forward and backward, through the model chunks of this rank."""

    def __init__(self, chunks: Sequence[Any], stage: Stage, topology: Topology, *, portable: bool) -> None:
        self._chunks, self._stage, self._topology, self._portable = list(chunks), stage, topology, portable
        self._run = get_forward_backward_func()

    def prepare(self, pack: Pack) -> Microbatch:
        """Collate a pack, take this context-parallel rank's tokens, move them to the device."""
        groups, device = self._topology.groups, self._topology.device
        whole = self._stage.collate(pack)
        indices = zigzag_indices(whole.cu_seqlens, rank=groups.cp.rank(), size=groups.cp.size())
        batch = whole.part(indices).to(device)
        if not self._portable:
            return Microbatch(batch, transformer_engine_segments(batch.cu_seqlens))
        packed = portable_segments(batch, context_rank=groups.cp.rank(), context_size=groups.cp.size())
        return Microbatch(batch, packed)

    def __call__(self, packs: Sequence[Pack], *, forward_only: bool = False) -> dict[str, float]:
        """Sums over all ranks and packs, `name` and `name_count` for every metric of the stage.

        Gradients are accumulated in the chunks' buffers, reduced, and divided by the global count. The result
        is complete on the last pipeline stage and empty before it.
        """
        microbatches = [self.prepare(pack) for pack in packs]
        outputs: list[Metrics] = self._run(
            forward_step_func=self._forward,
            data_iterator=[iter(microbatches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(microbatches),
            seq_length=len(packs[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self._reduce(outputs)

    def _forward(self, microbatches: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, Any]:
        microbatch = next(microbatches)
        batch = microbatch.batch
        output = chunk(
            batch.tokens[None],
            batch.positions[None],
            None,
            labels=batch.labels[None],
            packed_seq_params=microbatch.packed,
        )
        return output, partial(self._stage.loss, batch=batch)

    def _reduce(self, outputs: list[Metrics]) -> dict[str, float]:
        if not outputs:
            return {}
        names = list(outputs[0])
        pairs = [
            torch.stack([torch.stack([x.double() for x in output[name]]) for name in names])
            for output in outputs
        ]
        totals = torch.stack(pairs).sum(0)
        torch.distributed.all_reduce(totals, group=self._topology.groups.dp_cp)
        sums: dict[str, float] = {}
        for name, (value, count) in zip(names, totals.tolist(), strict=True):
            sums |= {name: value, f"{name}_count": count}
        return sums
