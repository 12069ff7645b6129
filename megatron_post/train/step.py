"""Forward and backward of one optimizer step, through megatron-core's pipeline schedules."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_post.data.batch import PackedBatch, moved, on_device
from megatron_post.data.pack import Pack
from megatron_post.models.adapted import without_adapters
from megatron_post.models.adapter_dropout import begin_microbatch, microbatch_state
from megatron_post.models.packing import portable_segments, transformer_engine_segments
from megatron_post.parallel.context import ContextSplit
from megatron_post.parallel.selection import Selection, select
from megatron_post.parallel.topology import Topology
from megatron_post.stages.base import Metrics, Stage


@dataclass(frozen=True)
class Microbatch:
    """This rank's part of a pack, and the boundaries of the whole pack's segments, for attention.

    trained: the part's tokens that carry loss. The vocabulary's product is computed for them alone. dropout:
    what adapters with dropout need, see `microbatch_state`.
    """

    batch: PackedBatch
    packed: PackedSeqParams
    trained: Selection
    dropout: Tensor | None = None

    def through(self, chunk: Any) -> Tensor:
        """Run a model chunk. Returns hidden states, or the head's output on the last pipeline stage."""
        batch = self.batch
        if self.dropout is not None:
            begin_microbatch(self.dropout)
        labels, positions = batch.labels[None], batch.positions[None]
        output: Tensor = chunk(
            batch.tokens[None],
            positions,
            None,
            labels=labels,
            packed_seq_params=self.packed,
            loss_mask=self.trained,
        )
        return output


class Stepper:
    """Runs packs forward, or forward and backward, through the model chunks of this rank.

    portable: the chunks use the portable attention, which takes another description of a pack's segments than
    Transformer Engine's attention. reference: a frozen policy. Its log-probabilities are added to each batch
    before the loss is computed. If it is `chunks` itself, the adapters are switched off for it. dropout_seed:
    the seed of adapters with dropout. `losses` has the mean loss of each pack of the last call, on the last
    pipeline stage. `trained` is the number of trained tokens of these packs.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        stage: Stage,
        topology: Topology,
        *,
        portable: bool,
        reference: Sequence[Any] | None = None,
        dropout_seed: int | None = None,
    ) -> None:
        self._chunks, self._stage, self._topology, self._portable = list(chunks), stage, topology, portable
        self._reference = None if reference is None else list(reference)
        self._shares_base = reference is chunks
        self._sequence_parallel = any(get_model_config(chunk).sequence_parallel for chunk in self._chunks)
        self._run = get_forward_backward_func()
        self._dropout_seed = dropout_seed
        self.losses: list[float] = []
        self.trained = 0

    def __call__(
        self, packs: Sequence[Pack], *, forward_only: bool = False, step: int = 0
    ) -> dict[str, float]:
        """Sum every metric of the stage over all ranks and packs, as `name` and `name_count`.

        step: the number of the optimizer step, with which adapters drop other inputs of the same pack.

        Gradients are accumulated in the chunks' buffers, reduced, and divided by the global count. The result
        is complete on the last pipeline stage and empty on the other stages.
        """
        # Every pipeline stage prepares every pack. The middle stages need no tokens, but their attention
        # needs the boundaries of segments, which megatron-core does not send from stage to stage.
        self.trained = 0
        microbatches = [self.prepare(pack, step=step) for pack in packs]
        if self._reference is not None:
            with without_adapters(self._reference) if self._shares_base else contextlib.nullcontext():
                microbatches = self._with_reference(microbatches, self._reference)
        outputs: list[Metrics] = self._schedule(
            self._chunks, microbatches, self._take_loss, forward_only=forward_only
        )
        return self._reduce(outputs)

    def outputs(self, packs: Sequence[Pack]) -> list[tuple[Tensor, PackedBatch]]:
        """The model's output for each pack, with this rank's part of the pack.

        The list is empty on every pipeline stage but the last.
        """
        microbatches = [self.prepare(pack) for pack in packs]
        outputs = self._forward_all(self._chunks, microbatches)
        return [(output, m.batch) for output, m in zip(outputs, microbatches, strict=False)]

    def bad_gradients(self, packs: Sequence[Pack]) -> list[int]:
        """Find the packs whose gradients on this rank are not finite, by running each one alone.

        Gradients are not reduced, so that only the rank whose packs caused the fault reports it. The gradient
        buffers cannot be used afterwards. The interleaved schedule runs packs in groups, and the result then
        names the first pack of each group. All ranks must call this method.
        """
        virtual = len(self._chunks) > 1
        size = self._topology.groups.pp.size() if virtual else 1
        bad = []
        for start in range(0, len(packs), size):
            for chunk in self._chunks:
                # Without this the chunk would not reduce its gradients again.
                chunk.zero_grad_buffer()
            with _no_reduction(self._chunks):
                self(packs[start : start + size])
            buffers = [buffer.grad_data for chunk in self._chunks for buffer in chunk.buffers]
            if not all(bool(gradient.isfinite().all()) for gradient in buffers):
                bad.append(start)
        return bad

    def prepare(self, pack: Pack, *, step: int = 0) -> Microbatch:
        """Collate a pack, take this context-parallel rank's tokens, and move them to the device."""
        groups, device = self._topology.groups, self._topology.device
        whole = self._stage.collate(pack)
        self.trained += int(whole.trained.sum())
        split = ContextSplit(whole.cu_seqlens, groups.cp.size())
        indices = split.indices(groups.cp.rank())
        part = whole.part(indices)
        trained = select(
            part.trained,
            rank=groups.tp.rank(),
            size=groups.tp.size(),
            sequence_parallel=self._sequence_parallel,
        )
        batch = part.to(device)
        if self._portable:
            packed = portable_segments(whole, split, rank=groups.cp.rank(), device=device)
        else:
            packed = transformer_engine_segments(whole.cu_seqlens, context_size=split.size, device=device)
        microbatch = Microbatch(batch, packed, moved(trained, device))
        if self._dropout_seed is None:
            return microbatch
        text = f"{self._dropout_seed}/{step}/".encode() + pack.sample_ids.tobytes() + pack.lengths.tobytes()
        state = microbatch_state(int.from_bytes(hashlib.sha256(text).digest()[:4], "little") >> 1, indices)
        return dataclasses.replace(microbatch, dropout=on_device(state, device))

    def _with_reference(self, microbatches: list[Microbatch], chunks: list[Any]) -> list[Microbatch]:
        logps = self._forward_all(chunks, microbatches)
        if not logps:  # only the last pipeline stage computes the loss, so only it needs them
            return microbatches
        return [
            dataclasses.replace(m, batch=dataclasses.replace(m.batch, reference_logps=reference))
            for m, reference in zip(microbatches, logps, strict=True)
        ]

    @torch.no_grad()
    def _forward_all(self, chunks: list[Any], microbatches: list[Microbatch]) -> list[Tensor]:
        found: list[dict[str, Tensor]] = self._schedule(chunks, microbatches, _take_output, forward_only=True)
        return [item["output"] for item in found]

    def _schedule(
        self, chunks: list[Any], microbatches: list[Microbatch], take: Any, *, forward_only: bool
    ) -> list[Any]:
        """Run megatron-core's pipeline schedule.

        Returns the result of `take(output, batch)` per microbatch.
        """

        def forward(iterator: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, Any]:
            microbatch = next(iterator)
            return microbatch.through(chunk), partial(take, batch=microbatch.batch)

        # The schedule divides the sequence length by the context-parallel size, so it gets the whole pack's.
        # Each model chunk of the interleaved schedule runs all microbatches, so each has its own iterator.
        context_size = self._topology.groups.cp.size()
        return self._run(
            forward_step_func=forward,
            data_iterator=[iter(microbatches) for _ in chunks],
            model=chunks,
            num_microbatches=len(microbatches),
            seq_length=len(microbatches[0].batch.tokens) * context_size,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _take_loss(self, output: Tensor, *, batch: PackedBatch) -> tuple[Tensor, Tensor, Metrics]:
        return self._stage.loss(output, batch)

    def _reduce(self, outputs: list[Metrics]) -> dict[str, float]:
        if not outputs:
            self.losses = []
            return {}
        names = list(outputs[0])
        pairs = [
            torch.stack([torch.stack([x.double() for x in output[name]]) for name in names])
            for output in outputs
        ]
        each = torch.stack(pairs)
        totals = each.sum(0, keepdim=True)
        # Metrics are reduced as sums and counts, like the loss. A mean of per-rank means would give packs
        # with few pairs the same weight as packs with many.
        torch.distributed.all_reduce(totals, group=self._topology.groups.dp_cp)
        # The host waits for the GPU once, and not for the packs and then for their sum.
        *rows, sum_of_all = torch.cat((each, totals)).tolist()
        loss = names.index("loss")
        self.losses = [row[loss][0] / max(row[loss][1], 1) for row in rows]
        sums: dict[str, float] = {}
        for name, (value, count) in zip(names, sum_of_all, strict=True):
            sums |= {name: value, f"{name}_count": count}
        return sums


@contextlib.contextmanager
def _no_reduction(chunks: Sequence[Any]) -> Iterator[None]:
    """Within this context a backward pass leaves this rank's gradients unreduced."""
    # The schedule reduces gradients through these hooks. With overlap, backward hooks of the chunks reduce
    # them as well, which `no_sync` turns off.
    config = get_model_config(chunks[0])
    hooks = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    before = {name: getattr(config, name) for name in hooks}
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
        for name in hooks:
            setattr(config, name, None)
        try:
            yield
        finally:
            for name, hook in before.items():
                setattr(config, name, hook)


def _take_output(output: Tensor, *, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # The schedule expects a loss and a count. They are not used, because there is no backward pass.
    return output.sum(), torch.zeros([], dtype=torch.int32), {"output": output}
