"""Floating-point operations of packs: those that the model needs, and those that are computed in addition.

A multiply-add is two operations. A matrix of P parameters takes 2 P t forward. It takes twice that backward,
for the gradients of its input and of itself. A frozen matrix has only the first of them. Only trained tokens
need the output projection.

Causal attention computes half of every segment's square. Scores and weighted values take 2 a L^2 forward,
with a = heads x head_dim, and 4 a L^2 backward. Fused attention computes the scores again in its backward
pass, which makes 5 a L^2. A segment that also attends to `seen` tokens before it has L^2 + 2 L seen instead
of L^2.

Norms, activations, rotary embedding, softmax and the optimizer are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_post.config.schema import Config
from megatron_post.plan.activations import Activations, Segment
from megatron_post.plan.adapters import adapter_forward
from megatron_post.plan.shape import Chunk, chunks, layer_matrices, vocabulary_rows

# Multiples of the forward pass: what fused attention computes in its backward pass, and what the model needs
# of it.
ATTENTION_BACKWARD, ATTENTION_GRADIENTS = 2.5, 2.0


@dataclass(frozen=True)
class Load:
    """The work of packs.

    squares: the sum over their segments of L^2 + 2 L seen. trained: tokens that carry loss. The fused loss
    multiplies the vocabulary's matrix with these alone.
    """

    tokens: float
    squares: float
    trained: float

    @staticmethod
    def of(segments: Iterable[Segment], *, trained: float) -> "Load":
        lengths = [(s.length, s.seen) for s in segments]
        return Load(sum(n for n, _ in lengths), sum(n * (n + 2 * seen) for n, seen in lengths), trained)

    def __add__(self, other: "Load") -> "Load":
        return Load(self.tokens + other.tokens, self.squares + other.squares, self.trained + other.trained)

    def __mul__(self, times: float) -> "Load":
        return Load(self.tokens * times, self.squares * times, self.trained * times)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and backward pass. The model needs matrices and attention.

    The others are additional.

    recomputed: activations under the recompute policy. scores: attention's scores in its backward pass. loss:
    products of the head beyond three, for chunks whose logits were not kept and for padding rows. reference:
    the forward pass of a frozen reference.
    """

    matrices: float = 0.0
    attention: float = 0.0
    recomputed: float = 0.0
    scores: float = 0.0
    loss: float = 0.0
    reference: float = 0.0

    @property
    def model(self) -> float:
        """FLOPs that the model's mathematics needs, however it is computed."""
        return self.matrices + self.attention

    @property
    def executed(self) -> float:
        """All FLOPs that the hardware executes."""
        return float(sum(getattr(self, f.name) for f in fields(self)))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Flops":
        return Flops(*(getattr(self, f.name) * times for f in fields(self)))


def step_flops(config: Config, load: Load) -> Flops:
    """FLOPs of all ranks that hold the model together. load: of the whole packs.

    With the load of real tokens, `model` is what the step needs. With the load of padded tokens, `executed`
    is what it does.
    """
    tensor, context = config.parallel.tensor, config.parallel.context
    parts = [chunk for rank in chunks(config) for chunk in rank]
    return sum(
        (chunk_flops(config, chunk, load, tensor_rank=r) * context for chunk in parts for r in range(tensor)),
        Flops(),
    )


def chunk_flops(config: Config, chunk: Chunk, load: Load, *, tensor_rank: int = 0) -> Flops:
    """FLOPs of one rank's share of packs through a chunk, forward and backward. load: of the whole packs.

    The last tensor-parallel ranks hold padding rows of the vocabulary, which the fused loss does not
    multiply.
    """
    tokens = load.tokens / config.parallel.context
    matrices = {name: 2 * tokens * size * chunk.layers for name, size in layer_matrices(config).items()}
    attention = attention_forward(config, load.squares) * chunk.layers
    head, extra = _head(config, load, tensor_rank) if chunk.head else (0.0, 0.0)
    forward, adapters = sum(matrices.values()) + head, adapter_forward(config, tokens) * chunk.layers
    frozen = forward if config.adapter is not None else 0.0
    if config.traits.scalar_head:
        frozen = max(0.0, frozen - head)  # the head of a reward model is trained beside an adapter
    return Flops(
        matrices=3 * (forward + adapters) - frozen,
        attention=(1 + ATTENTION_GRADIENTS) * attention,
        recomputed=_recomputed(config, matrices, attention) + adapters * (config.recompute.mode == "full"),
        scores=(ATTENTION_BACKWARD - ATTENTION_GRADIENTS) * attention,
        loss=extra,
        reference=config.runs_reference * (forward + attention),
    )


def attention_forward(config: Config, squares: float) -> float:
    """FLOPs of a layer's attention on one rank. squares: of the whole packs."""
    m, p = config.model, config.parallel
    return 2 * squares * m.num_attention_heads * m.head_dim / p.tensor / p.context


def loss_again(config: Config, trained_share: float) -> float:
    """Share of the fused loss' logits that its backward pass computes again.

    These are the logits of all chunks except the last. trained_share: of a pack's tokens, from 0 to 1.
    """
    tokens = round(config.data.pack_length // config.parallel.context * trained_share)
    if config.traits.scalar_head or config.loss.impl != "fused" or not tokens:
        return 0.0
    chunk = Activations(config, "transformer_engine", ()).loss_chunk(tokens)
    return (tokens - 1) // chunk * chunk / tokens


def _head(config: Config, load: Load, tensor_rank: int) -> tuple[float, float]:
    """FLOPs of the output projection that the model needs, and FLOPs beyond three times that.

    The first is of the forward pass. It has the trained tokens and the real vocabulary.
    """
    h, rows, context = config.model.hidden_size, vocabulary_rows(config), config.parallel.context
    tokens, trained = load.tokens / context, load.trained / context
    if config.traits.scalar_head:
        return 2 * tokens * h / config.parallel.tensor, 0.0
    real = min(max(config.model.vocab_size - tensor_rank * rows, 0), rows)
    one = 2 * trained * h * real
    if config.loss.impl == "unfused":
        times = 3 if config.adapter is None else 2
        return one, times * (2 * tokens * h * rows - one)
    return one, loss_again(config, load.trained / load.tokens if load.tokens else 0.0) * one


def _recomputed(config: Config, matrices: dict[str, float], attention: float) -> float:
    r = config.recompute
    if r.mode == "full":
        return sum(matrices.values()) + attention
    if r.mode == "none":
        return 0.0
    mlp = matrices["fc1"] + matrices["fc2"]
    return attention * ("core_attn" in r.modules) + mlp * ("mlp" in r.modules)
