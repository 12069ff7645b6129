"""Figures of one rank's share: the measured speed, and the planner's prediction for the same passes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_post.bench.accounting import Counts
from megatron_post.bench.record import Figure, once
from megatron_post.config.schema import Config
from megatron_post.plan.activations import Segment
from megatron_post.plan.flops import Flops, Load, chunk_flops
from megatron_post.plan.hardware import GIB, gpu_of_device
from megatron_post.plan.shape import Chunk, chunk_parameters
from megatron_post.plan.timing import Costs


@dataclass(frozen=True)
class Passes:
    """One pack through the rank's chunks: seconds forward and backward, and the counts of the pack."""

    forward: float
    backward: float
    counts: Counts


@dataclass(frozen=True)
class Share:
    """The part of the model that a rank has.

    chunks: as the planner divides the model. parameters: of the modules that were built.
    """

    config: Config
    rank: int
    world_size: int
    tensor_rank: int
    data_size: int
    chunks: tuple[Chunk, ...]
    parameters: int

    @property
    def planned_parameters(self) -> int:
        return sum(chunk_parameters(self.config, chunk) for chunk in self.chunks)

    def flops(self, load: Load) -> Flops:
        """FLOPs of packs on this rank's share. load: of the whole packs."""
        parts = (chunk_flops(self.config, c, load, tensor_rank=self.tensor_rank) for c in self.chunks)
        return dataclasses.replace(sum(parts, Flops()), reference=0.0)  # the proxy runs no frozen reference


def proxy_figures(share: Share, taken: Sequence[Passes], *, memory: int) -> dict[str, Figure]:
    """Rates of this rank's arithmetic. On a GPU that the planner knows, also the planner's predictions."""
    seconds = [passes.forward + passes.backward for passes in taken]
    pairs = list(zip(taken, seconds, strict=True))
    model = tuple(share.flops(p.counts.useful).model / s / 1e12 for p, s in pairs)
    executed = tuple(share.flops(p.counts.computed).executed / s / 1e12 for p, s in pairs)
    figures = {
        "pack, compute only": Figure("s", tuple(seconds), "lower"),
        "phase: forward": Figure("s", tuple(p.forward for p in taken), "lower"),
        "phase: backward": Figure("s", tuple(p.backward for p in taken), "lower"),
        "model TFLOP/s": Figure("TFLOP/s", model, "higher"),
        "executed TFLOP/s": Figure("TFLOP/s", executed, "higher"),
        "packing efficiency": Figure("%", tuple(100 * p.counts.real / p.counts.capacity for p in taken)),
        "parameters": once("", share.parameters),
        "parameters by the planner": once("", share.planned_parameters),
        "memory": once("GiB", memory / GIB, "lower"),
    }
    device = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if device is None:
        return figures
    costs = Costs(share.config, device, share.data_size)
    segment = (Segment(share.config.data.pack_length),)
    for kind in ("forward", "backward"):
        times = [costs.chunk(chunk, segment, kind) for chunk in share.chunks]
        planned = sum(time.total - time.communication for time in times)
        figures[f"{kind} by the planner, one segment"] = once("s", planned)
    return figures | {
        "MFU, compute only": Figure("%", tuple(100e12 * x / device.bf16 for x in model), "higher")
    }


def share_summary(share: Share) -> str:
    """Tensor-parallel shard, layers and parameters, on one line."""
    parts = ", ".join(
        f"{c.layers} layers" + " with the embedding" * c.embedding + " with the head" * c.head
        for c in share.chunks
    )
    tensor = share.config.parallel.tensor
    return f"tensor-parallel shard {share.tensor_rank} of {tensor}; {parts}; {share.parameters:,} parameters"
