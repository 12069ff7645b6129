"""Time of the passes of a training step: a roofline for every operation, and collectives by size and place.

An operation takes max(FLOPs / reached FLOP/s, bytes / reached bytes/s). A ring collective of n ranks moves (n
- 1) / n of its bytes over the slowest link that it crosses: NVLink within a node, and one network card for
each GPU between nodes.

Collectives of tensor parallelism count as waiting, except those that run beside another multiplication of the
backward pass. User buffers may hide more, and the published runs may use them. But multiplications beside
user buffers run slower, and counting the collectives as waiting is closer to the published steps than
counting neither effect. `THIS_TRAINER` is this trainer, and `NEMO` is the published runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_post.config.schema import Config
from megatron_post.plan.activations import Segment
from megatron_post.plan.adapters import adapter_traffic
from megatron_post.plan.flops import ATTENTION_BACKWARD, attention_forward, loss_again
from megatron_post.plan.hardware import GPU
from megatron_post.plan.shape import Chunk, LocalSizes, layer_matrices


@dataclass(frozen=True)
class Software:
    """What differs between trainers in the same layout.

    chunked_loss: logits of one chunk exist at a time, and are computed again in the backward pass.
    gradient_bytes: bytes of an accumulated gradient, which is also reduced in this form.
    """

    chunked_loss: bool
    gradient_bytes: int


THIS_TRAINER = Software(chunked_loss=True, gradient_bytes=4)
# NVIDIA/NeMo, scripts/performance/helpers.py sets `grad_reduce_in_fp32 = False`.
NEMO = Software(chunked_loss=False, gradient_bytes=2)


@dataclass(frozen=True)
class PassTime:
    """Seconds of a forward or backward pass by kind. communication: the part that is not hidden."""

    matrices: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.elementwise + self.communication

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, times: float) -> "PassTime":
        return PassTime(*(times * part for part in self.parts))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        return self.matrices, self.attention, self.elementwise, self.communication


@dataclass(frozen=True)
class Costs:
    """Times of passes through the chunks of a layout, for packs of given segments.

    trained_share: share of a pack's tokens that carry loss, from 0 to 1. Only these have logits.
    """

    config: Config
    gpu: GPU
    data_size: int
    software: Software = THIS_TRAINER
    trained_share: float = 1.0

    @cached_property
    def _z(self) -> LocalSizes:
        return LocalSizes.of(self.config)

    def layer(self, segments: Sequence[Segment], kind: str) -> PassTime:
        """One layer. The backward pass includes recomputation."""
        forward = self._layer(segments, backward=False)
        if kind == "forward":
            # Recomputed layers first run without gradients, and then user buffers gather nothing.
            full = self.config.recompute.mode == "full"
            return self._layer(segments, backward=False, gradients=False) if full else forward
        return self._layer(segments, backward=True) + self._recomputed(forward)

    def _layer(self, segments: Sequence[Segment], *, backward: bool, gradients: bool = True) -> PassTime:
        times = [
            self._matrix(name, count, backward, gradients=gradients)
            for name, count in layer_matrices(self.config).items()
        ]
        matrices = sum(compute for compute, _ in times)
        return PassTime(
            matrices=matrices,
            attention=self._attention(segments, backward=backward),
            elementwise=self._bytes(self._traffic(backward=backward)) + self._casts(backward=backward),
            communication=sum(exposed for _, exposed in times) + self._exchange(),
        )

    def _exchange(self) -> float:
        """Seconds in which context-parallel ranks exchange heads for tokens (`cp_comm_type=a2a`) and back.

        Queries, keys, values and output, or their gradients, are exchanged. Nothing hides this time.
        """
        z = self._z
        if self.config.parallel.cp_comm_type != "a2a":
            return 0.0
        return sum(
            self.collective(2 * z.t * width, z.context, spacing=z.tensor) for width in (z.a, z.k, z.k, z.a)
        )

    def _matrix(
        self, name: str, parameters: int, backward: bool, *, gradients: bool = True
    ) -> tuple[float, float]:
        """Seconds of a layer's multiplication, and of its communication that is not hidden."""
        z = self._z
        one = self._multiply(parameters, fp8=True)
        if not backward:
            before = name in ("qkv", "fc1")
            return one, self._exposed(before=before, beside=one if gradients or not before else 0.0)
        if self.config.adapter is not None:  # a frozen matrix has no gradient that would hide a scatter
            before = name in ("proj", "fc2")
            return one, self._exposed(before=before, beside=one if before else 0.0)
        # the accumulated gradient is read and written
        accumulated = 2 * self.software.gradient_bytes
        gradient = max(one, self._bytes(accumulated * parameters))
        if not self.config.optimizer.gradient_accumulation_fusion:
            gradient = one + self._bytes((2 + 2 + accumulated) * parameters)
        if name in ("qkv", "fc1"):
            # The input is gathered again beside one multiplication, its gradient is scattered beside another.
            hidden = max(0.0, self._tensor_scatter() - one)
            hidden += max(0.0, self._tensor_gather() - one) if z.sequence else 0.0
            return one + gradient, hidden
        return one + gradient, self._exposed(before=True, beside=one) if z.sequence else 0.0

    def _exposed(self, *, before: bool, beside: float = 0.0) -> float:
        """Seconds of waiting for a gather before a multiplication, or for a scatter after it.

        beside: seconds of the multiplication if user buffers may divide it. A gather divides it by the ranks,
        whose parts arrive one by one. A scatter divides it into four parts, and the last part is sent after
        the whole multiplication.
        """
        z = self._z
        if z.tensor == 1 or (before and not z.sequence):
            return 0.0
        whole = self._tensor_gather() if before else self._tensor_scatter()
        if self.config.parallel.tp_comm_overlap and beside:
            if before:
                return max(0.0, whole - beside * (z.tensor - 1) / z.tensor)
            return whole / 4 + max(0.0, whole - beside) * 3 / 4
        return whole if z.sequence else 2 * whole

    def _tensor_scatter(self) -> float:
        z = self._z
        return self.collective(z.t * z.h * 2, z.tensor, spacing=1)

    def _tensor_gather(self, *, fp8: bool = True) -> float:
        """Transformer Engine casts to FP8 before it gathers the input of a multiplication."""
        z = self._z
        size = 1 if fp8 and self.config.precision.fp8 and z.sequence else 2
        return self.collective(z.t * z.h * size, z.tensor, spacing=1)

    def collective(self, size: float, ranks: int, *, spacing: int) -> float:
        """Seconds of a ring gather or scatter of `size` bytes over ranks that are `spacing` apart."""
        if ranks == 1:
            return 0.0
        link = self.gpu.nvlink
        if ranks * spacing > self.gpu.per_node:
            # Each member of the group in a node sends through its own network card.
            link = min(link, self.gpu.network * max(1, self.gpu.per_node // spacing))
        return size * (ranks - 1) / ranks / (link * self.gpu.link_efficiency) + self.gpu.latency

    def _attention(self, segments: Sequence[Segment], *, backward: bool) -> float:
        """Seconds of causal attention.

        A segment takes 2 L^2 a FLOPs forward. The backward pass takes 2.5 times as many, because it computes
        scores again.
        """
        z = self._z
        squares = sum(s.length * s.length + 2 * s.length * s.seen for s in segments)
        share = self.gpu.attention_backward if backward else self.gpu.attention_forward
        flops = attention_forward(self.config, squares) * (ATTENTION_BACKWARD if backward else 1.0)
        seconds = flops / (self.gpu.bf16 * share)
        if self.config.parallel.cp_comm_type == "a2a":
            return seconds
        # The ring sends keys and values while the attention of earlier ones is computed.
        ring = self.collective(
            4 * z.t * z.context * z.k * (2 if backward else 1), z.context, spacing=z.tensor
        )
        return max(seconds, ring)

    def _traffic(self, *, backward: bool) -> float:
        """Bytes of a layer's operations other than multiplications."""
        z = self._z
        stream, inner = z.s * z.h, z.t * (2 * z.a + 2 * z.k)
        norms_and_sums = 2 * (2 + 3) * stream
        swiglu = 3 * z.t * z.f
        adapters = adapter_traffic(self.config, tokens=z.t)
        if backward:
            return 2 * (2 * norms_and_sums + inner + 5 * z.t * z.f + adapters)
        return 2 * (norms_and_sums + inner + swiglu + adapters)

    def _casts(self, *, backward: bool) -> float:
        """Seconds of a layer's casts to FP8.

        A cast reads bf16, finds the largest value, and writes FP8 and, if needed, its transpose. Forward the
        inputs of matrices are cast. Those of fc1 and QKV are cast within the norm. Backward the gradients of
        the matrices' outputs are cast.
        """
        if not self.config.precision.fp8:
            return 0.0
        z = self._z
        stream, written = z.s * z.h, 2 if self.gpu.transposed_fp8 else 1
        if backward:
            size = (2 + written) * (2 * stream + z.t * (z.a + 2 * z.k + 2 * z.f))
        else:
            size = written * 2 * stream + (2 + written) * z.t * (z.a + z.f)
        return self._bytes(size) / self.gpu.cast_efficiency

    def _recomputed(self, forward: PassTime) -> PassTime:
        r = self.config.recompute
        if r.mode == "full":
            return forward
        if r.mode == "none":
            return PassTime()
        z = self._z
        matrices = layer_matrices(self.config)
        again = PassTime(
            attention=forward.attention * ("core_attn" in r.modules),
            elementwise=self._bytes(2 * 4 * z.s * z.h) * ("layernorm" in r.modules),
            communication=self._exchange() * ("core_attn" in r.modules),
        )
        if "mlp" in r.modules:
            names = ("fc1", "fc2")
            times = [self._matrix(name, matrices[name], False) for name in names]
            again += PassTime(
                matrices=sum(a for a, _ in times),
                elementwise=self._bytes(6 * z.t * z.f),
                communication=sum(b for _, b in times),
            )
        return again

    def head(self, kind: str) -> PassTime:
        """The last norm, the output projection (never FP8) and the loss."""
        z = self._z
        if self.config.traits.scalar_head:
            return PassTime(elementwise=self._bytes(4 * z.s * z.h))
        share = self.trained_share if self.config.loss.impl == "fused" else 1.0
        one = self._multiply(z.rows * z.h, fp8=False, share=share)
        logits = share * z.t * z.rows
        if kind == "forward":
            return PassTime(
                matrices=one,
                elementwise=self._bytes(logits * (4 if self.software.chunked_loss else 16)),
                communication=share * self._tensor_gather(fp8=False) if z.sequence else 0.0,
            )
        written, accumulated = (4 if self.software.chunked_loss else 12), 2 * self.software.gradient_bytes
        again = loss_again(self.config, share) if self.software.chunked_loss else 0.0
        gather = share * self._tensor_scatter() if z.tensor > 1 else 0.0
        frozen = self.config.adapter is not None
        return PassTime(
            matrices=(2 - frozen + again) * one,
            elementwise=self._bytes(logits * written + accumulated * z.rows * z.h * (not frozen)),
            communication=2 * gather if self.software.chunked_loss else max(0.0, gather - one),
        )

    def embedding(self) -> PassTime:
        """The lookup or the sum of its gradient, and the scatter of the sequence."""
        z = self._z
        gather = self._tensor_scatter() if z.tensor > 1 else 0.0
        return PassTime(elementwise=self._bytes(4 * z.t * z.h), communication=gather)

    def chunk(self, chunk: Chunk, segments: Sequence[Segment], kind: str) -> PassTime:
        """One pass of a pack through a chunk."""
        time = self.layer(segments, kind) * chunk.layers
        if chunk.embedding:
            time += self.embedding()
        return time + self.head(kind) if chunk.head else time

    def transfer(self) -> float:
        """Seconds until a pipeline rank's result has reached the next rank."""
        z, p = self._z, self.config.parallel
        if p.pipeline == 1:
            return 0.0
        inside = p.model_size * self.data_size <= self.gpu.per_node
        link = self.gpu.nvlink if inside else self.gpu.network
        return 2 * z.s * z.h / (link * self.gpu.link_efficiency) + self.gpu.latency

    def _multiply(self, parameters: int, *, fp8: bool, share: float = 1.0) -> float:
        """Seconds of a share of this rank's tokens times one matrix, limited by arithmetic or by memory."""
        tokens = share * self._z.t
        peak = self.gpu.fp8_measured if fp8 and self.config.precision.fp8 else self.gpu.bf16_measured
        return max(2 * tokens * parameters / (peak * self.gpu.matrix_efficiency), self._bytes(2 * parameters))

    def _bytes(self, size: float) -> float:
        return size / (self.gpu.memory_bandwidth * self.gpu.bandwidth_efficiency)
