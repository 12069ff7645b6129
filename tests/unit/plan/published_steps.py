"""Fits the one free number: the share of a GPU's peak that multiplications reach in published steps."""

import csv
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.plan.activations import FP32, Segment
from megatron_post.plan.hardware import gpu
from megatron_post.plan.memory import memory
from megatron_post.plan.step import step_time
from megatron_post.plan.timing import NEMO, Costs


@dataclass(frozen=True)
class Published:
    """A measured step of another trainer on H100s, in a layout that this planner can express."""

    name: str
    config: Config
    sequences: int  # of a pack
    data_size: int
    seconds: float
    source: str


def read_published(path: Path) -> list[Published]:
    """Rows of published_step_times.csv: model, precision, layers, layout, seconds, source.

    A microbatch of several sequences is a pack of as many segments.
    """
    with path.open() as file:
        return [_published(row) for row in csv.DictReader(file)]


def _published(row: dict[str, str]) -> Published:
    number = {key: int(row[key]) for key in ("gpus", "seq_len", "tp", "pp", "cp", "dp", "vp", "mbs", "gbs")}
    layers, chunks = int(row["layers"]), number["pp"] * number["vp"]
    values: dict[str, Any] = {
        "run_dir": "unused",
        "model": {"preset": row["model"].replace("llama3.1-", "llama3.1_"), "num_layers": layers},
        "tokenizer": {"path": "unused"},
        "data": {"store": "unused", "pack_length": number["seq_len"] * number["mbs"]},
        "parallel": {
            "tensor": number["tp"],
            "sequence": number["tp"] > 1,
            "pipeline": number["pp"],
            "virtual_pipeline": number["vp"],
            "context": number["cp"],
            "embedding_and_loss_as_layers": layers % chunks != 0,
        },
        # NeMo keeps and gathers the weights of its FP8 runs in FP8.
        "precision": {"fp8": "tensorwise", "fp8_param_gather": True} if row["precision"] == "fp8" else {},
        "optimizer": {"overlap": True, "gradient_accumulation_fusion": True},
        "train": {"steps": 1, "global_batch": number["gbs"] // number["mbs"]},
    }
    name = f"{row['model']} {row['precision']} on {row['gpus']}"
    config = validate(values, origin=name)
    return Published(name, config, number["mbs"], number["dp"], float(row["step_s"]), row["source"])


def predicted(point: Published, *, matrix_efficiency: float | None = None) -> float:
    """Seconds of a published step as this planner predicts them."""
    device = gpu("h100-80gb")
    if matrix_efficiency is not None:
        device = dataclasses.replace(device, matrix_efficiency=matrix_efficiency)
    costs = Costs(point.config, device, point.data_size, NEMO)
    pack = (Segment(point.config.data.pack_length // point.sequences),) * point.sequences
    return step_time(costs, [pack] * (point.config.train.global_batch // point.data_size)).seconds


def fullest_rank(point: Published) -> int:
    """Bytes of the fullest pipeline rank of a published run, whose gradients have `NEMO.gradient_bytes`."""
    pack = (Segment(point.config.data.pack_length // point.sequences),) * point.sequences
    device = gpu("h100-80gb")
    ranks = memory(point.config, data_size=point.data_size, segments=pack, reserve=device.reserve)
    return max(rank.total - rank.kinds["gradients"] * (FP32 - NEMO.gradient_bytes) // FP32 for rank in ranks)


def fit(points: list[Published]) -> float:
    """The efficiency whose predictions have the least squared error of logarithms, to 0.001."""

    def error(efficiency: float) -> float:
        return sum(math.log(predicted(p, matrix_efficiency=efficiency) / p.seconds) ** 2 for p in points)

    low, high = 0.5, 1.0
    # a ternary search works because time falls as efficiency rises, so the error is convex
    while high - low > 1e-3:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return round((low + high) / 2, 3)
