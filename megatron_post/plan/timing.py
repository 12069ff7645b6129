"""Time of a training step: a roofline for every operation, collectives by size and place, the pipeline
simulated.

An operation takes max(FLOPs / reached FLOP/s, bytes / reached bytes/s). A ring collective of n ranks moves (n
- 1) / n of its bytes over the slowest link that it crosses: NVLink within a node, one network card a GPU
beyond. Those of tensor parallelism are waited for, but for the ones that run beside another multiplication of
the backward pass; where userbuffers hide more (the published runs may use them), multiplications beside them
run slower, and counting either as waiting is closer to what was published than counting neither. `OURS` is
this trainer, `NEMO` the published runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_post.config.schema import Config
from megatron_post.plan.activations import Segment
from megatron_post.plan.flops import ATTENTION_BACKWARD, attention_forward, loss_again
from megatron_post.plan.hardware import GPU
from megatron_post.plan.shape import Chunk, layer_matrices, vocabulary_rows


@dataclass(frozen=True)
class Software:
    """chunked_loss: logits of one chunk at a time, computed again in the backward pass."""

    chunked_loss: bool


OURS = Software(chunked_loss=True)
NEMO = Software(chunked_loss=False)


@dataclass(frozen=True)
class PassTime:
    """Seconds of a forward or backward pass by what it does; communication is what nothing hides."""

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
    """Times of passes through the chunks of a layout, for packs of given segments."""

    config: Config
    gpu: GPU
    data_size: int
    software: Software = OURS

    @cached_property
    def _z(self) -> "_Local":
        return _Local.of(self.config)

    def layer(self, segments: Sequence[Segment], kind: str) -> PassTime:
        """One layer, recomputation in its backward pass included."""
        forward = self._layer(segments, backward=False)
        if kind == "forward":
            # what is recomputed runs without gradients at first, where user buffers gather nothing
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
            elementwise=self._bytes(self._traffic(backward=backward)),
            communication=sum(exposed for _, exposed in times) + self._exchange(),
        )

    def _exchange(self) -> float:
        """Seconds in which context-parallel ranks exchange heads for tokens (`cp_comm_type=a2a`) and back,
        which nothing hides: queries, keys, values and output, or as many gradients."""
        z = self._z
        if self.config.parallel.cp_comm_type != "a2a":
            return 0.0
        return sum(
            self.collective(2 * z.t * width, z.context, spacing=z.tensor) for width in (z.a, z.k, z.k, z.a)
        )

    def _matrix(
        self, name: str, parameters: int, backward: bool, *, gradients: bool = True
    ) -> tuple[float, float]:
        """Seconds of a layer's multiplication, and of its communication that is not hidden behind it."""
        z = self._z
        one = self._multiply(parameters, fp8=True)
        if not backward:
            before = name in ("qkv", "fc1")
            return one, self._exposed(before=before, beside=one if gradients or not before else 0.0)
        gradient = max(one, self._bytes(8 * parameters))  # read and added to in fp32
        if not self.config.optimizer.gradient_accumulation_fusion:
            gradient = one + self._bytes((2 + 2 + 8) * parameters)
        gather = self._tensor_collective()
        if name in ("qkv", "fc1"):
            # the input is gathered again beside one multiplication, its gradient scattered beside the other
            hidden = max(0.0, gather - one) * (2 if z.sequence else 1)
            return one + gradient, hidden
        return one + gradient, self._exposed(before=True, beside=one) if z.sequence else 0.0

    def _exposed(self, *, before: bool, beside: float = 0.0) -> float:
        """Seconds of a gather before, or a scatter behind, a multiplication, that are waited for.

        beside: seconds of the multiplication, where user buffers may divide it: by the ranks whose parts
        arrive one by one, or in four, of which the last is scattered when all is multiplied.
        """
        z = self._z
        if z.tensor == 1 or (before and not z.sequence):
            return 0.0
        if self.config.parallel.tp_comm_overlap and beside:
            whole = self._tensor_collective()
            if before:
                return max(0.0, whole - beside * (z.tensor - 1) / z.tensor)
            return whole / 4 + max(0.0, whole - beside) * 3 / 4
        return self._tensor_collective() * (1 if z.sequence else 2)

    def _tensor_collective(self) -> float:
        z = self._z
        return self.collective(z.t * z.h * 2, z.tensor, spacing=1)

    def collective(self, size: float, ranks: int, *, spacing: int) -> float:
        """Seconds of a ring gather or scatter of `size` bytes over ranks that stand `spacing` apart."""
        if ranks == 1:
            return 0.0
        link = self.gpu.nvlink if ranks * spacing <= self.gpu.per_node else self.gpu.network
        return size * (ranks - 1) / ranks / (link * self.gpu.link_efficiency) + self.gpu.latency

    def _attention(self, segments: Sequence[Segment], *, backward: bool) -> float:
        """Causal: 2 L^2 a FLOPs of a segment forward, 2.5 times as many backward, which computes scores
        again."""
        z = self._z
        squares = sum(s.length * s.length + 2 * s.length * s.seen for s in segments)
        share = self.gpu.attention_backward if backward else self.gpu.attention_forward
        flops = attention_forward(self.config, squares) * (ATTENTION_BACKWARD if backward else 1.0)
        seconds = flops / (self.gpu.bf16 * share)
        if self.config.parallel.cp_comm_type == "a2a":
            return seconds
        # the ring of context parallelism sends keys and values beside the attention of those before
        ring = self.collective(
            4 * z.t * z.context * z.k * (2 if backward else 1), z.context, spacing=z.tensor
        )
        return max(seconds, ring)

    def _traffic(self, *, backward: bool) -> float:
        """Bytes of a layer's operations that are no multiplications."""
        z = self._z
        stream, inner = z.s * z.h, z.t * (2 * z.a + 2 * z.k)
        norms_and_sums = 2 * (2 + 3) * stream
        swiglu = 3 * z.t * z.f
        size = 2 * (norms_and_sums + inner + swiglu)
        if backward:
            size = 2 * (2 * norms_and_sums + inner + 5 * z.t * z.f)
        if self.config.precision.fp8:
            # casts: read bf16, write FP8 and, where needed, its transpose; forward the matrices' inputs
            # (those of fc1 and QKV within the norm), backward the gradients of their outputs
            written = 2 if self.gpu.transposed_fp8 else 1
            if backward:
                size += (2 + written) * (2 * stream + z.t * (z.a + 2 * z.k + 2 * z.f))
            else:
                size += written * 2 * stream + (2 + written) * z.t * (z.a + z.f)
        return size

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
        one = self._multiply(z.rows * z.h, fp8=False)
        logits = z.t * z.rows
        if kind == "forward":
            return PassTime(
                matrices=one,
                elementwise=self._bytes(logits * (4 if self.software.chunked_loss else 16)),
                communication=self._exposed(before=True),
            )
        again = loss_again(self.config) if self.software.chunked_loss else 0.0
        gather = self._tensor_collective() if z.tensor > 1 else 0.0
        return PassTime(
            matrices=(2 + again) * one,
            elementwise=self._bytes(logits * (4 if self.software.chunked_loss else 12) + 8 * z.rows * z.h),
            communication=2 * gather if self.software.chunked_loss else max(0.0, gather - one),
        )

    def embedding(self) -> PassTime:
        """The lookup, or the sum of its gradient; and the scatter of the sequence."""
        z = self._z
        gather = self._tensor_collective() if z.tensor > 1 else 0.0
        return PassTime(elementwise=self._bytes(4 * z.t * z.h), communication=gather)

    def chunk(self, chunk: Chunk, segments: Sequence[Segment], kind: str) -> PassTime:
        """One pass of a pack through a chunk."""
        time = self.layer(segments, kind) * chunk.layers
        if chunk.embedding:
            time += self.embedding()
        return time + self.head(kind) if chunk.head else time

    def transfer(self) -> float:
        """Seconds in which a pipeline rank's result reaches the next."""
        z, p = self._z, self.config.parallel
        if p.pipeline == 1:
            return 0.0
        inside = p.model_size * self.data_size <= self.gpu.per_node
        link = self.gpu.nvlink if inside else self.gpu.network
        return 2 * z.s * z.h / (link * self.gpu.link_efficiency) + self.gpu.latency

    def _multiply(self, parameters: int, *, fp8: bool) -> float:
        """All of this rank's tokens by one matrix: the longer of arithmetic and memory."""
        z = self._z
        peak = self.gpu.fp8_measured if fp8 and self.config.precision.fp8 else self.gpu.bf16_measured
        return max(2 * z.t * parameters / (peak * self.gpu.matrix_efficiency), self._bytes(2 * parameters))

    def _bytes(self, size: float) -> float:
        return size / (self.gpu.memory_bandwidth * self.gpu.bandwidth_efficiency)


@dataclass(frozen=True)
class _Local:
    t: int
    s: int
    h: int
    a: int
    k: int
    f: int
    rows: int
    tensor: int
    context: int
    sequence: bool

    @staticmethod
    def of(config: Config) -> "_Local":
        m, p = config.model, config.parallel
        t = config.data.pack_length // p.context
        return _Local(
            t=t,
            s=t // p.tensor if p.sequence else t,
            h=m.hidden_size,
            a=m.num_attention_heads * m.head_dim // p.tensor,
            k=m.num_key_value_heads * m.head_dim // p.tensor,
            f=m.ffn_hidden_size // p.tensor,
            rows=vocabulary_rows(config),
            tensor=p.tensor,
            context=p.context,
            sequence=p.sequence,
        )
