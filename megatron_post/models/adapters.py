"""LoRA and DoRA on the linear layers of a model, exact in every layout.

For a matrix W [out, in] the adapted layer computes
    LoRA (Hu et al., arXiv:2106.09685):  y = W x + s B A x,  s = alpha / rank
    DoRA (Liu et al., arXiv:2402.09353): y = m / |W + s B A| * (W x + s B A x), where |.| is the length of
                                         each row, through which no gradient flows
A is [rank, in] and B is [out, rank]. megatron-core fuses several of Hugging Face's matrices into one layer.
Each of them has an adapter of its own, as in PEFT.

Tensor parallelism divides the rows of q, k, v, gate and up. Their A is replicated, and B has the rank's rows.
It divides the columns of o and down. Their A has the rank's columns, and B is replicated. The ranks exchange
only A x, which has `rank` columns. With sequence parallelism a replicated matrix sees a part of the tokens on
each rank, so megatron-core sums its gradient over the ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_post.config.adapter import Adapter as Settings
from megatron_post.config.sections import Model
from megatron_post.models.adapter_dropout import drop, tokens_of_microbatch

# The linear layers of a transformer layer, and the targets that each of them fuses.
LINEARS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
ROW_PARALLEL = ("o_proj", "down_proj")
PARTS = ("A", "B", "magnitude")  # the last one is DoRA's


def split_dimension(target: str, part: str) -> int | None:
    """The dimension of an adapter's part that tensor parallelism divides. None if it is replicated."""
    if target in ROW_PARALLEL:
        return 1 if part == "A" else None
    return None if part == "A" else 0


class Adapter(torch.nn.Module):
    """The adapters of one linear layer's targets. Its parameters are named `q_proj_A`, `q_proj_B` and so on.

    enabled: whether the layer's output is adapted. Without it the layer is that of the base model.
    """

    def __init__(
        self, settings: Settings, model: Model, config: TransformerConfig, name: str, *, group: Any
    ) -> None:
        """name: of the linear layer, with the number of its layer in the model before it."""
        super().__init__()
        self._name, self._dropout, linear = name, settings.dropout, name.partition(".")[2]
        self.enabled, self._group, self._sequence = True, group, config.sequence_parallel
        self._scale, self.is_dora = settings.scale, settings.kind == "dora"
        self._row_parallel = LINEARS[linear][0] in ROW_PARALLEL
        self._groups, self._widths = fused_rows(linear, model, tensor_size=group.size())
        self.targets: list[str] = [target for target in LINEARS[linear] if target in settings.targets]
        self._square: Tensor | None = None
        columns = linear_columns(linear, model) // (group.size() if self._row_parallel else 1)
        for target in self.targets:
            rows = self._groups * self._widths[target]
            shapes = {"A": (settings.rank, columns), "B": (rows, settings.rank)}
            for part, shape in (shapes | ({"magnitude": (rows,)} if self.is_dora else {})).items():
                values = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
                self.register_parameter(f"{target}_{part}", self._marked(values, target, part))

    def _marked(self, values: Tensor, target: str, part: str) -> torch.nn.Parameter:
        """A parameter with megatron-core's marks, which its norms and sums of gradients read."""
        parameter = torch.nn.Parameter(values)
        dimension = split_dimension(target, part)
        if dimension is not None:
            set_tensor_model_parallel_attributes(parameter, True, dimension, 1)
        else:
            parameter.sequence_parallel = self._sequence  # type: ignore[attr-defined]
        return parameter

    def part(self, target: str, part: str) -> torch.nn.Parameter:
        """The part "A", "B" or "magnitude" of a target's adapter."""
        found: torch.nn.Parameter = getattr(self, f"{target}_{part}")
        return found

    def forward(self, x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        """Adapt a layer's output [t, 1, out / tp].

        x: [t, 1, in], the layer's input. weight: the layer's own. Row-parallel layers have an input of [t, 1,
        in / tp] and an output of [t, 1, out]. With sequence parallelism the side that tensor parallelism does
        not divide has t / tp tokens.
        """
        if not self.enabled:
            return output
        inputs = self._dropped(x)
        low = torch.cat([F.linear(inputs[target], self.part(target, "A")) for target in self.targets], dim=-1)
        parts = dict(zip(self.targets, self._exchanged(low).chunk(len(self.targets), -1), strict=True))
        updates = {
            target: F.linear(part, self.part(target, "B")) * self._scale for target, part in parts.items()
        }
        adapted = output + self._fuse(updates, fill=0.0)
        if not self.is_dora:
            return adapted
        with torch.no_grad():
            lengths = self.lengths(weight)
        factors = {target: self.part(target, "magnitude") / lengths[target] for target in self.targets}
        return adapted * self._fuse(factors, fill=1.0)

    def _dropped(self, x: Tensor) -> dict[str, Tensor]:
        """The input of each target. Each drops other numbers, as in PEFT."""
        if not self._dropout or not self.training:
            return dict.fromkeys(self.targets, x)
        (seed, tokens), first = tokens_of_microbatch(), 0
        if self._row_parallel:
            first = self._group.rank() * x.shape[-1]
        elif self._sequence:
            tokens = tokens.chunk(self._group.size())[self._group.rank()]
        return {
            target: drop(
                x, seed, tokens, adapter=f"{self._name}.{target}", first_column=first, share=self._dropout
            )
            for target in self.targets
        }

    def _exchanged(self, low: Tensor) -> Tensor:
        """A x of all columns and of the tokens that B multiplies. low: this rank's part of it."""
        if self._row_parallel:
            # Each rank has a part of the columns, so its product is a summand.
            if self._sequence:
                return reduce_scatter_to_sequence_parallel_region(low, group=self._group)
            return reduce_from_tensor_model_parallel_region(low, group=self._group)
        # Each rank's rows of B give a summand of the gradient of A x.
        if self._sequence:
            return gather_from_sequence_parallel_region(low, group=self._group)
        return copy_to_tensor_model_parallel_region(low, group=self._group)

    def _fuse(self, parts: dict[str, Tensor], *, fill: float) -> Tensor:
        """Join targets' columns [..., out / tp] in the order of the fused layer.

        A target without an adapter has the value `fill`.
        """
        first = next(iter(parts.values()))
        if len(self._widths) == 1:
            return first
        grouped = [
            parts[target].unflatten(-1, (self._groups, width))
            if target in parts
            else first.new_full((*first.shape[:-1], self._groups, width), fill)
            for target, width in self._widths.items()
        ]
        return torch.cat(grouped, dim=-1).flatten(-2)

    def _rows(self, weight: Tensor) -> dict[str, Tensor]:
        """The rows of each target in a fused weight [out / tp, in], as views or copies."""
        groups = weight.unflatten(0, (self._groups, -1)).split(list(self._widths.values()), dim=1)
        return {target: rows.flatten(0, 1) for target, rows in zip(self._widths, groups, strict=True)}

    def lengths(self, weight: Tensor) -> dict[str, Tensor]:
        """|W + s B A| of each target's rows, [out / tp], in the dtype of the weight.

        The square is |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, row by row. So B A never has to be in memory.
        |W| is computed once, because W is frozen.
        """
        rows = self._rows(weight)
        squares = []
        for target in self.targets:
            a, b = self.part(target, "A"), self.part(target, "B").float()
            cross = (F.linear(rows[target], a).float() * b).sum(1)
            own = (b @ (a.float() @ a.float().t()) * b).sum(1)
            squares.append(2 * self._scale * cross + self._scale**2 * own)
        if self._square is None:
            lengths = [
                torch.linalg.vector_norm(rows[target], dim=1, dtype=torch.float32) for target in self.targets
            ]
            self._square = torch.cat(lengths).square()
        square = self._square + torch.cat(squares)
        if self._row_parallel and self._group.size() > 1:
            torch.distributed.all_reduce(square, group=self._group)
        split = square.sqrt().to(weight.dtype).split([len(rows[target]) for target in self.targets])
        return dict(zip(self.targets, split, strict=True))

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The adapted weight [out / tp, in] that gives the same layer without an adapter.

        Tensor-parallel ranks must call this together.
        """
        updates = {
            target: self.part(target, "B").float() @ self.part(target, "A").float() * self._scale
            for target in self.targets
        }
        adapted = weight.float() + self._fuse_rows(updates, fill=0.0)
        if self.is_dora:
            lengths = self.lengths(weight)
            factors = {
                target: self.part(target, "magnitude").float() / lengths[target].float()
                for target in self.targets
            }
            adapted *= self._fuse(factors, fill=1.0)[:, None]
        return adapted.to(weight.dtype)

    def _fuse_rows(self, parts: dict[str, Tensor], *, fill: float) -> Tensor:
        return self._fuse({target: rows.t() for target, rows in parts.items()}, fill=fill).t()

    @torch.no_grad()
    def start_magnitudes(self, weight: Tensor) -> None:
        """Set DoRA's magnitudes to the lengths of the rows, so that the layer is unchanged."""
        for target, lengths in self.lengths(weight).items():
            self.part(target, "magnitude").copy_(lengths)


def fused_rows(linear: str, model: Model, *, tensor_size: int) -> tuple[int, dict[str, int]]:
    """The number of groups in a rank's output of a linear layer, and the width of each target in a group."""
    if linear == "self_attention.linear_qkv":
        d, heads = model.head_dim, model.num_attention_heads // model.num_key_value_heads
        return model.num_key_value_heads // tensor_size, {"q_proj": heads * d, "k_proj": d, "v_proj": d}
    if linear == "mlp.linear_fc1":
        return 1, dict.fromkeys(LINEARS[linear], model.ffn_hidden_size // tensor_size)
    return 1, {LINEARS[linear][0]: model.hidden_size}


def linear_columns(linear: str, model: Model) -> int:
    """Width of a linear layer's input."""
    if linear == "mlp.linear_fc2":
        return model.ffn_hidden_size
    return model.num_attention_heads * model.head_dim if linear.endswith("proj") else model.hidden_size


def target_shape(target: str, model: Model) -> tuple[int, int]:
    """Rows and columns of a target's matrix."""
    (linear,) = [name for name, targets in LINEARS.items() if target in targets]
    rows = {
        "q_proj": model.num_attention_heads * model.head_dim,
        **dict.fromkeys(("k_proj", "v_proj"), model.num_key_value_heads * model.head_dim),
        **dict.fromkeys(("gate_proj", "up_proj"), model.ffn_hidden_size),
    }
    return rows.get(target, model.hidden_size), linear_columns(linear, model)
