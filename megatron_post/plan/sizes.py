"""Sizes of one rank's tensors. The names are explained in `plan.activations`."""

from dataclasses import dataclass

from megatron_post.config.schema import Config
from megatron_post.plan.shape import vocabulary_rows

FP32 = 4


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens, widths, and bytes of a number, of the rank whose attention keeps most."""

    t: int
    s: int
    T: int
    h: int
    a: int
    k: int
    f: int
    d: int
    heads: int
    rows: int
    element: int
    linear_input: int
    tensor: int
    context: int
    context_rank: int
    sequence: bool

    @staticmethod
    def of(config: Config) -> "Sizes":
        m, p = config.model, config.parallel
        t = config.data.pack_length // p.context
        element = 2 if config.precision.dtype == "bf16" else FP32
        heads = m.num_attention_heads // p.tensor
        return Sizes(
            t=t,
            s=t // p.tensor if p.sequence else t,
            T=config.data.pack_length,
            h=m.hidden_size,
            a=heads * m.head_dim,
            k=m.num_key_value_heads // p.tensor * m.head_dim,
            f=m.ffn_hidden_size // p.tensor,
            d=m.head_dim,
            heads=heads,
            rows=vocabulary_rows(config),
            element=element,
            # With FP8 a matrix keeps the transposed FP8 copy of its input for the gradient of the weight.
            linear_input=1 if config.precision.fp8 else element,
            tensor=p.tensor,
            context=p.context,
            context_rank=p.context - 1,
            sequence=p.sequence,
        )
