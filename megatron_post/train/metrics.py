"""What a run reports: a JSON line and TensorBoard scalars a step, and a line on the console."""

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_post.display import say


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
            say(text)

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
