"""What a run reports: a JSON line and TensorBoard scalars a step, and a line on the console."""

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_post.config.schema import Model

# Dense BF16 TFLOP/s of one GPU, NVIDIA's data sheets, by a part of the name that CUDA gives it.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "B200": 2250.0, "A100": 312.0}


def model_flops(model: Model, *, tokens: float, squared_lengths: float) -> float:
    """FLOPs of forward and backward, without recomputation, over packed segments.

    tokens: real tokens; squared_lengths: sum over segments of length^2, for attention costs what its segments
    cost and not the square of the pack. A multiply-add is two FLOPs, backward is twice forward, and causal
    attention computes half of each square: 6 P t + 6 layers * heads * head_dim * sum L^2, with P the
    matrices' parameters (the embedding is a lookup, the output projection is not).
    """
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    layer = attention + 3 * h * model.ffn_hidden_size
    matrices = model.num_layers * layer + h * model.vocab_size
    return 6 * matrices * tokens + 6 * model.num_layers * model.num_attention_heads * d * squared_lengths


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of one GPU by its name, or None where it is not in the table."""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in device_name), None)


class MetricsWriter:
    """Writes to `run_dir` on the one rank that reports; elsewhere every call does nothing."""

    def __init__(self, run_dir: str | Path, *, active: bool) -> None:
        self._active = active
        if active:
            directory = Path(run_dir)
            directory.mkdir(parents=True, exist_ok=True)
            self._lines = (directory / "metrics.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(str(directory / "tensorboard"))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """kind: "train" or "eval"."""
        if not self._active:
            return
        self._lines.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def console(self, text: str) -> None:
        if self._active:
            print(text, flush=True)

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._board.close()


def train_line(step: int, total: int, values: dict[str, Any]) -> str:
    """One step on the console."""
    seconds = (total - step) * values["seconds"]
    eta = f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"step {step:>{len(str(total))}}/{total}  loss {values['loss']:.4f}  "
        f"grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
        f"{values['tokens_per_second']:,.0f} tokens/s{mfu}  eta {eta}"
    )
