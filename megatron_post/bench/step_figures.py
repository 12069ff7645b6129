"""Figures of timed steps: the slowest rank's seconds, and rates of tokens and operations."""

from collections.abc import Sequence

import torch

from megatron_post.bench.accounting import Counts
from megatron_post.bench.environment import environment
from megatron_post.bench.record import Figure, Record, once
from megatron_post.bench.step import Measured, Rank
from megatron_post.config.schema import Config
from megatron_post.plan.estimate import layout_line
from megatron_post.plan.flops import step_flops
from megatron_post.plan.hardware import GIB, gpu_of_device
from megatron_post.plan.shape import model_parameters

FORMULA = (
    "model FLOPs = 6 P t + 6 layers x heads x head_dim x sum of L^2, where P is the parameters of matrices, "
    "t the real tokens, and L the real lengths of segments (attention is causal, so half of each square). "
    "Executed FLOPs also count padding, recomputation, attention's scores in its backward pass, chunks of "
    "the loss that are computed again, and a frozen reference. Formulas that count the whole square of a "
    "whole row, as torchtitan's does, give higher numbers for the same speed"
)


def step_record(measured: Measured, *, warmup: int, origin: str, overrides: Sequence[str] = ()) -> Record:
    """The record of a measurement of the config file `origin` with `overrides` of its keys."""
    settings = _step_settings(measured, warmup=warmup) | (
        {"overrides": " ".join(overrides)} if overrides else {}
    )
    return Record(
        benchmark="step",
        subject=f"{measured.config.stage}, {origin}",
        settings=settings,
        figures=step_figures(measured),
        environment=environment(),
        notes=step_notes(measured),
    )


def step_figures(measured: Measured) -> dict[str, Figure]:
    """The figures of a measurement.

    The seconds of a step are those of its slowest rank. Phases are means over ranks. Rates are computed step
    by step.
    """
    config, ranks = measured.config, measured.ranks
    each = "GPU" if torch.cuda.is_available() else "rank"
    seconds = [max(rank.steps[i].seconds for rank in ranks) for i in range(len(ranks[0].steps))]
    counts = _total_counts(ranks)
    shares = [1 / (s * len(ranks)) for s in seconds]
    model = tuple(step_flops(config, c.useful).model * x / 1e12 for c, x in zip(counts, shares, strict=True))
    executed = tuple(
        step_flops(config, c.computed).executed * x / 1e12 for c, x in zip(counts, shares, strict=True)
    )
    figures = {
        "step": Figure("s", tuple(seconds), "lower"),
        f"tokens/s/{each}": _rate([c.real for c in counts], shares),
        f"trained tokens/s/{each}": _rate([c.trained for c in counts], shares),
        f"padded tokens/s/{each}": _rate([c.capacity for c in counts], shares),
        "examples/s": _rate([c.examples for c in counts], [x * len(ranks) for x in shares]),
        f"model TFLOP/s/{each}": Figure("TFLOP/s", model, "higher"),
        f"executed TFLOP/s/{each}": Figure("TFLOP/s", executed, "higher"),
    }
    device = gpu_of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if device is not None:
        figures["MFU"] = Figure("%", tuple(100e12 * x / device.bf16 for x in model), "higher")
    fill = tuple(100 * c.real / c.capacity for c in counts)
    figures["packing efficiency"] = Figure("%", fill, "higher")
    for phase in ranks[0].steps[0].phases:
        figures[f"phase: {phase}"] = Figure("s", _means(ranks, phase), "lower")
    if len(ranks) > 1:
        figures["own work, slowest / mean"] = Figure("x", _imbalance(ranks), "lower")
    figures["memory, fullest rank"] = once("GiB", max(rank.memory for rank in ranks) / GIB, "lower")
    return figures


def step_notes(measured: Measured) -> tuple[str, ...]:
    """Notes about the data, the slowest and the fullest rank, and how FLOPs are counted."""
    notes = list(measured.notes)
    if len(measured.ranks) > 1:
        slowest, fullest = _slowest_rank(measured.ranks), max(measured.ranks, key=lambda rank: rank.memory)
        notes.append(f"slowest by its own work: rank {slowest}; fullest: rank {fullest.rank}")
    if not torch.cuda.is_available():
        notes.append(
            "no MFU: the peak of this processor is not published. Memory is that of the process, with its "
            "libraries"
        )
    elif gpu_of_device(torch.cuda.get_device_name()) is None:
        notes.append(f"no MFU: {torch.cuda.get_device_name()} is not in plan/hardware.py")
    else:
        notes.append("MFU is relative to the dense bf16 peak, also with FP8")
    return (*notes, FORMULA)


def _step_settings(measured: Measured, *, warmup: int) -> dict[str, str]:
    """The settings of the run, as text."""
    config, ranks = measured.config, len(measured.ranks)
    return {
        **model_settings(config),
        "layout": layout_line(config, measured.data_size).replace("one GPU", "one rank"),
        "ranks": str(ranks),
        "batch": f"{config.train.global_batch} packs of {config.data.pack_length:,} tokens, "
        f"{config.train.global_batch // measured.data_size} a data-parallel rank",
        "data": measured.data,
        "steps": f"{len(measured.ranks[0].steps)}, after {warmup} to warm up",
    }


def model_settings(config: Config) -> dict[str, str]:
    """Stage and model, as text."""
    m = config.model
    shape = f"{m.num_layers} layers of {m.hidden_size:,}, vocabulary {m.vocab_size:,}"
    return {
        "stage": config.stage,
        "model": f"{m.preset or 'own'}, {model_parameters(config):,} parameters, {shape}",
    }


def _total_counts(ranks: tuple[Rank, ...]) -> list[Counts]:
    """Counts of each step, summed over data-parallel ranks. Other ranks have the same packs."""
    counting = [rank for rank in ranks if rank.counts_packs]
    return [sum((rank.steps[i].counts for rank in counting), Counts()) for i in range(len(ranks[0].steps))]


def _slowest_rank(ranks: tuple[Rank, ...]) -> int:
    """The rank whose own work took longest."""
    return max(ranks, key=lambda rank: sum(step.own for step in rank.steps)).rank


def _rate(amounts: list[int], shares: list[float]) -> Figure:
    return Figure("1/s", tuple(n * x for n, x in zip(amounts, shares, strict=True)), "higher")


def _means(ranks: tuple[Rank, ...], phase: str) -> tuple[float, ...]:
    return tuple(
        sum(r.steps[i].phases[phase] for r in ranks) / len(ranks) for i in range(len(ranks[0].steps))
    )


def _imbalance(ranks: tuple[Rank, ...]) -> tuple[float, ...]:
    works = [[rank.steps[i].own for rank in ranks] for i in range(len(ranks[0].steps))]
    return tuple(max(work) * len(work) / sum(work) for work in works)
