"""Memory that a forward pass keeps for its backward pass, and working memory of both, module by module.

There are three kinds of layers, because they keep different tensors:
* "portable" (models/specs.py) follows from its operations on a CPU. tests/unit/plan/test_memory.py compares
  the two. Its norms compute in fp32 and keep three tensors. Its SwiGLU keeps five tensors of width f.
* "transformer_engine" follows from the tensors that its modules and megatron-core's fused SwiGLU and RoPE
  save in their source (TE 2.x). It was **not measured** on a GPU.
* "mixed" is the second kind with the attention of the first, as FlexAttention computes it. It was **not
  measured** either.

t is the tokens of this context-parallel rank. s is the share of them that the rank holds between
tensor-parallel regions: t / tp with sequence parallelism, and otherwise t. T is the tokens of the whole pack.
a, k and f are the rank's widths of heads, key-value heads and ffn. All results are bytes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_post.config.schema import Config
from megatron_post.models.adapters import LINEARS
from megatron_post.plan.adapters import input_bytes, update_bytes
from megatron_post.plan.sizes import FP32, Sizes

Layers = Literal["portable", "transformer_engine", "mixed"]
INT64 = 8
QKV, PROJECTION, FC1, FC2 = LINEARS
CHUNK_BYTES = 512 * 2**20  # bytes of logits in one of several chunks of linear_logprob
CPU_BLOCK = 2**22  # logits that its torch implementation computes at a time


@dataclass(frozen=True)
class Segment:
    """Tokens of a pack that attend to each other.

    seen: tokens of earlier segments to which they also attend.
    """

    length: int
    seen: int = 0


@dataclass(frozen=True)
class Activations:
    """Bytes of one pack in this layout."""

    config: Config
    layers: Layers
    segments: tuple[Segment, ...]

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.config)

    def norm(self, linear: str | None = None) -> int:
        """A norm: its input (the residual stream) and its output, which the next matrix keeps.

        linear: the linear layer behind it. The final norm has none, and the head always keeps its output.
        """
        z = self._sizes
        recomputed = self._selective("layernorm")
        if self.layers == "portable" and recomputed:
            return z.s * z.h * z.element
        output = z.s * (z.h * z.linear_input if linear is None else self._input(linear, z.h))
        if self.layers == "portable":
            # A frozen norm does not keep its product before the weight.
            kept = 1 if self.config.adapter is not None else 2
            return z.s * (z.h * kept * FP32 + FP32) + output
        return z.s * (z.h * z.element + FP32) + (0 if recomputed else output)

    def _input(self, linear: str, width: int) -> int:
        """Bytes of a token's input that a linear layer keeps."""
        z = self._sizes
        return input_bytes(self.config, linear, width, plain=z.linear_input, element=z.element)

    def _updates(self, *linears: str) -> int:
        """Bytes that adapters of linear layers keep besides their input."""
        z = self._sizes
        tokens = {linear: z.s if linear.endswith(("proj", "fc2")) else z.t for linear in linears}
        return sum(
            update_bytes(self.config, linear, tokens=tokens[linear], element=z.element) for linear in linears
        )

    def norms(self) -> int:
        """Both norms of a layer.

        Transformer Engine fuses the second norm into the MLP's first matrix. So a recomputed MLP keeps only
        the input of that norm.
        """
        z, first, second = self._sizes, self.norm(QKV), self.norm(FC1)
        if not self._selective("mlp") or self._selective("layernorm"):
            return first + second
        if self.config.adapter is not None:
            # The MLP's input is kept, whether an adapter of its first matrix keeps it or not.
            return first + self.norm()
        return first + (z.s * z.h * z.element if self.layers != "portable" else second)

    def attention(self) -> int:
        """From the output of the QKV matrix to the input of the projection."""
        core = 0 if self._selective("core_attn") else self._core_attention()
        return self._attention_inputs() + core + self._updates(QKV, PROJECTION)

    def _attention_inputs(self) -> int:
        z = self._sizes
        mixed, rotated = z.t * (z.a + 2 * z.k), z.t * (z.a + z.k)
        if self.layers == "transformer_engine":
            # The attention's output is kept by the attention itself, and again by a matrix in another format.
            projected = z.t * z.a * z.element
            if self.config.adapter is not None and self.config.adapter.dropout:
                projected += z.t * self._input(PROJECTION, z.a)
            return z.element * (mixed + rotated) + projected
        projected = z.t * input_bytes(self.config, PROJECTION, z.a, plain=z.element, element=z.element)
        # cosine and sine of queries and of keys, which the fused rotation does not keep
        angles = 4 * z.t * z.d if self.layers == "portable" else 0
        if z.context > 1 and not self._selective("core_attn"):
            mixed, rotated = 0, z.t * z.a  # keys and values are kept after they are gathered
        return z.element * (mixed + angles + rotated) + projected

    def _core_attention(self) -> int:
        """Tensors that the attention kernel keeps besides its inputs."""
        z = self._sizes
        normalizers = FP32 * z.t * z.heads
        if self.layers == "transformer_engine":
            # The output is the projection's input. A context-parallel ring keeps no keys of other ranks. If
            # ranks exchange heads for tokens, the output before the exchange is kept as well.
            exchanged = self.config.parallel.cp_comm_type == "a2a"
            return normalizers + (z.element * z.t * z.a if exchanged else 0)
        gathered = 2 * z.T * z.k if z.context > 1 else 0
        return normalizers + z.element * (z.t * z.a + gathered + self._blocks())

    def _blocks(self) -> int:
        """Elements of masks, of blocks that are not square, and of keys and values that are joined.

        Chunk r of a segment's 2 cp chunks attends to r + 1 of them. FlexAttention keeps none of these.
        """
        if self.layers == "mixed":
            return 0
        z = self._sizes
        positions = (z.context_rank, 2 * z.context - 1 - z.context_rank) if z.context > 1 else (0,)
        elements = 0
        for segment in self.segments:
            chunk = segment.length // len(positions) // z.context
            for position in positions:
                keys = segment.seen + (position + 1) * chunk
                elements += (chunk * keys if keys > chunk else 0) + (2 * keys * z.k if segment.seen else 0)
        return elements

    def mlp(self) -> int:
        """From the output of fc1 to the input of fc2."""
        return 0 if self._selective("mlp") else self._mlp()

    def _mlp(self) -> int:
        z = self._sizes
        inner = z.t * self._input(FC2, z.f) + self._updates(FC1, FC2)
        return z.t * z.f * (4 if self.layers == "portable" else 2) * z.element + inner

    def first_input(self) -> int:
        """What the model's first norm does not keep, because a frozen embedding needs no gradient.

        With recomputation it has one nevertheless, see `models.adapted`.
        """
        z = self._sizes
        if self.config.adapter is None or self.config.recompute.mode != "none":
            return 0
        return z.s * (z.h * (FP32 if self.layers == "portable" else z.element) + FP32)

    def layer(self) -> int:
        """One layer between its forward and its backward pass."""
        if self.config.recompute.mode == "full":
            return self._sizes.s * self._sizes.h * self._sizes.element
        return self.whole_layer()

    def whole_layer(self) -> int:
        """One layer, with selective recomputation or none."""
        return self.norms() + self.attention() + self.mlp()

    def embedding(self) -> int:
        """Indices and mask of the vocabulary-parallel lookup."""
        return 0 if self._sizes.tensor == 1 else self._sizes.t * 3 * INT64

    def boundary(self, *, first: bool, last: bool) -> int:
        """Tensors that the schedule itself keeps for a chunk.

        They are the received input and, if the CPU does not free what it has sent, the output.
        """
        z = self._sizes
        one = z.s * z.h * z.element
        if self.layers != "portable":
            return 0  # the first norm keeps the input anyway, and the output is freed
        kept_anyhow = z.element == FP32 or self.config.recompute.mode == "full"
        return one * ((not first and not kept_anyhow) + (not last))

    def loss(self) -> dict[str, int]:
        """Tensors of the last chunk: the final norm and the head."""
        z, norm = self._sizes, self.norm()
        if self.config.adapter is not None and not self.config.traits.scalar_head:
            norm -= z.s * z.h * z.linear_input  # only the copy of the trained tokens is kept
        if self.config.traits.scalar_head:
            # The head reads the portable norm's output in fp32.
            copy = 0 if z.element == FP32 else z.s * z.h * FP32
            return {"norms": norm, "loss": copy + 4 * z.t * FP32}
        if self.config.loss.impl == "unfused":
            return {"norms": norm, "loss": z.t * z.rows * z.element + 8 * z.t * FP32}
        # The hidden states of the trained tokens are copied, and these may be all tokens.
        size = (self.loss_chunk(z.t) * z.rows + z.t * z.h) * z.element
        return {"norms": norm, "loss": size + 8 * z.t * FP32}

    def loss_chunk(self, tokens: int) -> int:
        """Tokens whose logits exist at one time, as megatron_post_kernels.linear_logprob chunks them.

        tokens: trained tokens of this rank.
        """
        z = self._sizes
        row = z.rows * z.element
        wide = z.rows * z.h * FP32 if z.element < FP32 else 0
        most = max(128, (CHUNK_BYTES + wide) // row)
        if tokens <= most:
            return tokens
        most = max(128, CHUNK_BYTES // row // 128 * 128)
        count = -(-tokens // most)
        return min(tokens, max(128, -(-tokens // (count * 128)) * 128))

    def loss_backward(self) -> int:
        """Working memory of the head's backward pass, beyond what is kept."""
        z = self._sizes
        if self.config.traits.scalar_head:
            return 2 * z.s * z.h * FP32
        if self.config.loss.impl == "unfused":
            hidden = z.t * z.h * z.element * (2 if z.sequence else 1)
            weight = 0 if self.config.adapter is not None else z.rows * z.h * z.element
            return max(self._softmax(z.t), hidden + weight)
        hidden = z.t * z.h * z.element
        weight = z.rows * z.h * z.element
        chunk = self.loss_chunk(z.t)
        if self.config.adapter is not None:
            return hidden + self._softmax(chunk)  # a frozen head has no gradient
        # The sum over chunks is kept in fp32 and rounded at the end, unless it goes into DDP's buffer.
        if chunk < z.t and z.element != FP32 and not self.config.optimizer.gradient_accumulation_fusion:
            weight += z.rows * z.h * FP32
            if self.layers == "portable":
                weight += chunk * (z.rows + z.h) * FP32  # the CPU multiplies in fp32
        return hidden + max(weight, self._softmax(chunk))

    def _softmax(self, tokens: int) -> int:
        """Working memory of the vocabulary's softmax: none in Triton, four fp32 blocks of logits in torch."""
        z = self._sizes
        if self.layers != "portable":
            return 0
        block = min(tokens * z.rows, CPU_BLOCK)
        return block * (4 * FP32 + (0 if z.element == FP32 else z.element))

    def layer_backward(self) -> int:
        """Working memory of a layer's backward pass, beyond what is kept. Recomputed tensors are included."""
        z = self._sizes
        stream = z.s * z.h * z.element
        ffn = z.t * z.f * z.element
        no_gradient = self.config.optimizer.gradient_accumulation_fusion or self.config.adapter is not None
        gradient = 0 if no_gradient else z.f * z.h * z.element
        mlp = max(2 * ffn, ffn + gradient)
        recomputed_mlp = self._recomputed_mlp() if self._selective("mlp") else 0
        core = self._core_attention() if self._selective("core_attn") else 0
        working = 2 * stream + max(mlp + recomputed_mlp, core + 3 * z.t * z.a * z.element - self.mlp())
        if self.config.recompute.mode == "full":
            kept = stream if self.layers != "portable" or z.element == FP32 else 0
            working += self.whole_layer() - kept + 2 * stream
        return working

    def _recomputed_mlp(self) -> int:
        if self.config.adapter is None:
            return self._mlp() + 2 * self.norm() - self.norms()
        dropped = self._sizes.s * self._input(FC1, self._sizes.h) if self.config.adapter.dropout else 0
        return self._mlp() + dropped

    def gather_buffer(self) -> int:
        """The gathered input of a matrix under sequence parallelism. All layers share one buffer.

        The portable layers gather for a frozen matrix without a buffer.
        """
        z = self._sizes
        if self.config.adapter is not None and self.layers == "portable":
            return 0
        return z.t * z.h * z.element if z.sequence else 0

    def batch(self) -> int:
        """A pack as tensors. The portable attention needs a description of each token."""
        z = self._sizes
        mine = z.t * (4 * INT64 + 1) + (z.t * FP32 if self.config.needs_reference else 0)
        return mine + (z.t * INT64 + z.T * (2 * INT64 + 1) if self.layers != "transformer_engine" else 0)

    def angles(self) -> int:
        """Rotary angles, which are kept for the recomputed layers of a chunk."""
        return self._sizes.t * self._sizes.d * FP32 if self.config.recompute.mode == "full" else 0

    def _selective(self, module: str) -> bool:
        r = self.config.recompute
        return r.mode == "selective" and module in r.modules
