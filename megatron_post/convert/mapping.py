"""The one table of Llama's parameter names and layouts in Hugging Face and megatron-core.

A rule says which Hugging Face tensors make up a megatron-core parameter, and how the shard of a
tensor-parallel rank is cut from them. All code that reads or writes weights uses this table.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_post.config.sections import Model

# Reads rows or columns [start, end) along `dim` of a Hugging Face tensor, or the whole tensor if dim is None.
ReadSlice = Callable[[str, int | None, int, int], Tensor]


@dataclass(frozen=True)
class Rule:
    """How one kind of parameter is laid out.

    core: megatron-core's name without pipeline chunk, with `{}` for the layer's number in the model. hf: the
    Hugging Face tensors that it is made of.

    layout: one of
      - "replicated";
      - "rows" or "columns": split over dim 0 or 1;
      - "qkv": query, key and value rows interleaved by query group;
      - "gate_up": each rank's gate rows, then its up rows;
      - "vocabulary": rows, padded.
    """

    core: str
    hf: tuple[str, ...]
    layout: str


SCORE, SCORE_BIAS = ("score.weight",), ("score.bias",)
_LAYER, _HF = "decoder.layers.{}.", "model.layers.{}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF + "self_attn."
RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
    Rule(_ATTENTION + "linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",), "replicated"),
    Rule(
        _ATTENTION + "linear_qkv.weight",
        (_HF_ATTENTION + "q_proj.weight", _HF_ATTENTION + "k_proj.weight", _HF_ATTENTION + "v_proj.weight"),
        "qkv",
    ),
    Rule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), "columns"),
    Rule(
        _LAYER + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), "replicated"
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        "gate_up",
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), "columns"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Rule("output_layer.weight", ("lm_head.weight",), "vocabulary"),
    Rule("output_layer.weight", SCORE, "replicated"),  # of a reward model
    Rule("output_layer.bias", SCORE_BIAS, "replicated"),  # of a reward model that scores steps
)
# Transformer Engine fuses these norms into the linear layer that follows. The portable layers keep them as
# modules of their own, with other names.
_PORTABLE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Meta's names of the Hugging Face tensors. Names of layers are without "model.layers.N." and "layers.N.".
META_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def rule_for(core_name: str, *, layer_offset: int, scalar_head: bool = False) -> tuple[Rule, tuple[str, ...]]:
    """The rule of a megatron-core parameter, and its Hugging Face names with layer numbers filled in.

    layer_offset: the number, in the whole model, of the chunk's layer 0. Raises `ValueError` for a parameter
    that a Llama does not have.
    """
    match = _LAYER_NAME.fullmatch(core_name)
    if match:
        layer, rest = int(match[1]) + layer_offset, match[2]
        pattern = _LAYER + _PORTABLE_NAMES.get(rest, rest)
    else:
        layer, pattern = 0, core_name
    for rule in RULES:
        if rule.core == pattern and (rule.hf == SCORE or not scalar_head or pattern != "output_layer.weight"):
            return rule, tuple(name.format(layer) for name in rule.hf)
    raise ValueError(f"parameter {core_name} has no counterpart in a Hugging Face Llama")


def hf_shapes(
    model: Model, *, scalar_head: bool = False, scores_steps: bool = False
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model with its shape, in the order of `transformers`' state dict.

    A model with tied embeddings has no lm_head. A reward model has a score instead of an lm_head,
    and if it scores steps, the score has a bias.
    """
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, h)}
    for layer in range(model.num_layers):
        prefix = _HF.format(layer)
        shapes |= {
            prefix + "self_attn.q_proj.weight": (model.num_attention_heads * d, h),
            prefix + "self_attn.k_proj.weight": (model.num_key_value_heads * d, h),
            prefix + "self_attn.v_proj.weight": (model.num_key_value_heads * d, h),
            prefix + "self_attn.o_proj.weight": (h, model.num_attention_heads * d),
            prefix + "mlp.gate_proj.weight": (f, h),
            prefix + "mlp.up_proj.weight": (f, h),
            prefix + "mlp.down_proj.weight": (h, f),
            prefix + "input_layernorm.weight": (h,),
            prefix + "post_attention_layernorm.weight": (h,),
        }
    shapes["model.norm.weight"] = (h,)
    if scalar_head:
        shapes[SCORE[0]] = (1, h)
        shapes |= {SCORE_BIAS[0]: (1,)} if scores_steps else {}
    elif not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, h)
    return shapes


@dataclass(frozen=True)
class CoreTensor:
    """A parameter as a megatron-core checkpoint stores it: whole, without padded rows, and stacked by layer.

    key: the name in the checkpoint. layer: its index in the stack of `layers`, or None if it belongs to no
    layer. shape: of one layer. hf: the Hugging Face tensors that it is made of.
    """

    key: str
    layer: int | None
    layers: int
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    rule: Rule

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole stack."""
        return self.shape if self.layer is None else (self.layers, *self.shape)

    def at(self, row: int) -> tuple[int, ...]:
        """Offsets of a row of this layer in the stack."""
        rest = (row, *(0 for _ in self.shape[1:]))
        return rest if self.layer is None else (self.layer, *rest)


@dataclass(frozen=True)
class RowRange:
    """Rows [core_row, core_row + rows) of a parameter, and the row of tensor `name` where they begin."""

    name: str
    hf_row: int
    core_row: int
    rows: int


def core_tensors(
    model: Model, *, scalar_head: bool = False, scores_steps: bool = False
) -> Iterator[CoreTensor]:
    """Every parameter of the model as a checkpoint stores it, in the order of the layers."""
    shapes = hf_shapes(model, scalar_head=scalar_head, scores_steps=scores_steps)
    in_layers = [rule for rule in RULES if rule.core.startswith(_LAYER)]
    outside = [rule for rule in RULES if rule not in in_layers and rule.hf[0] in shapes]
    places: list[tuple[Rule, int | None]] = [(outside[0], None)]
    places += [(rule, layer) for layer in range(model.num_layers) for rule in in_layers]
    for rule, layer in (*places, *((rule, None) for rule in outside[1:])):
        names = tuple(name.format(layer) for name in rule.hf)
        rows = sum(shapes[name][0] for name in names)
        key = rule.core.replace("layers.{}", "layers")
        yield CoreTensor(key, layer, model.num_layers, (rows, *shapes[names[0]][1:]), names, rule)


def row_ranges(tensor: CoreTensor, model: Model) -> list[RowRange]:
    """The row ranges of Hugging Face tensors that make up a parameter, in the order of its own rows."""
    if tensor.rule.layout == "qkv":
        groups, d = model.num_key_value_heads, model.head_dim
        parts = [(model.num_attention_heads // groups * d), d, d]
    else:
        groups, parts = 1, [tensor.shape[0] // len(tensor.hf)] * len(tensor.hf)
    return [
        RowRange(name, group * rows, group * sum(parts) + sum(parts[:i]), rows)
        for group in range(groups)
        for i, (name, rows) in enumerate(zip(tensor.hf, parts, strict=True))
    ]


def shard_from_hf(
    rule: Rule,
    names: tuple[str, ...],
    read: ReadSlice,
    model: Model,
    *,
    rank: int,
    size: int,
    padded_vocab: int,
) -> Tensor:
    """A tensor-parallel rank's shard of a megatron-core parameter. Reads only the slices of this rank."""
    if rule.layout == "replicated":
        return read(names[0], None, 0, 0)
    if rule.layout == "vocabulary":
        rows = padded_vocab // size
        start, end = rank * rows, min((rank + 1) * rows, model.vocab_size)
        real = read(names[0], 0, min(start, end), end)
        padding = real.new_zeros(rows - real.shape[0], real.shape[1])
        return torch.cat((real, padding)) if len(padding) else real
    if rule.layout == "qkv":
        heads, groups = model.num_attention_heads // size, model.num_key_value_heads // size
        q, k, v = (
            read(name, 0, rank * n * model.head_dim, (rank + 1) * n * model.head_dim)
            for name, n in zip(names, (heads, groups, groups), strict=True)
        )
        return interleave_qkv(q, k, v, groups=groups)
    if rule.layout == "gate_up":
        rows = model.ffn_hidden_size // size
        return torch.cat([read(name, 0, rank * rows, (rank + 1) * rows) for name in names])
    dim = {"rows": 0, "columns": 1}[rule.layout]
    whole = hf_shapes(model)[names[0]][dim]
    return read(names[0], dim, rank * whole // size, (rank + 1) * whole // size)


def hf_from_shards(
    rule: Rule, names: tuple[str, ...], shards: list[Tensor], model: Model
) -> dict[str, Tensor]:
    """The Hugging Face tensors of a parameter. shards: of all tensor-parallel ranks, in order."""
    if rule.layout == "replicated":
        return {names[0]: shards[0]}
    if rule.layout == "vocabulary":
        return {names[0]: torch.cat(shards)[: model.vocab_size]}
    if rule.layout == "qkv":
        # Each rank interleaves its own groups, so the shards are split before they are joined.
        by_rank = [
            split_qkv(s, groups=model.num_key_value_heads // len(shards), head_dim=model.head_dim)
            for s in shards
        ]
        return {name: torch.cat(part) for name, part in zip(names, zip(*by_rank, strict=True), strict=True)}
    if rule.layout == "gate_up":
        halves = [s.chunk(2) for s in shards]
        return {name: torch.cat(part) for name, part in zip(names, zip(*halves, strict=True), strict=True)}
    return {names[0]: torch.cat(shards, dim={"rows": 0, "columns": 1}[rule.layout])}


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int) -> Tensor:
    """Queries, keys and values as one matrix, group by group.

    q: [heads * d, h]. k and v: [groups * d, h]. The rows of a group are its queries, its key and its value.
    """
    hidden = q.shape[1]
    return torch.cat([x.reshape(groups, -1, hidden) for x in (q, k, v)], dim=1).reshape(-1, hidden)


def split_qkv(qkv: Tensor, *, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `interleave_qkv`."""
    hidden = qkv.shape[1]
    by_group = qkv.reshape(groups, -1, hidden)
    q, k, v = by_group.split((by_group.shape[1] - 2 * head_dim, head_dim, head_dim), dim=1)
    return q.reshape(-1, hidden), k.reshape(-1, hidden), v.reshape(-1, hidden)
