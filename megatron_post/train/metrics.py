"""Reports each step of a run as a JSON line, as TensorBoard scalars and as a line on the console."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_post.display import say
from megatron_post.train.step_lines import StepLines


class MetricsWriter:
    """Writes to `run_dir` on the one rank that reports. On other ranks every call does nothing.

    If the disk is full, the run goes on and the metrics are lost. may_write: see `StepLines`.
    """

    def __init__(
        self, run_dir: str | Path, *, active: bool, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self._active, self._may_write, self._directory = active, may_write, Path(run_dir)
        self._lines = StepLines(self._directory / "metrics.jsonl", may_write=may_write)
        self._board: SummaryWriter | None = None

    def begin(self, *, after: int) -> None:
        """Continue the run after step `after`.

        Lines of later steps are removed, and TensorBoard hides them.
        """
        if not self._active:
            return
        self._lines.cut_back(after)
        with self._board_guarded():
            if self._board is not None:
                self._board.close()
            self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=after + 1)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write the values of a step. kind: "train" or "eval"."""
        if not self._active:
            return
        self._lines.write(kind=kind, step=step, time=time.time(), **values)
        with self._board_guarded():
            if self._board is not None and self._may_write():
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def console(self, text: str) -> None:
        if self._active:
            with contextlib.suppress(OSError):  # the log's disk may be full, or the terminal closed
                say(text)

    def close(self) -> None:
        with self._board_guarded():
            if self._board is not None:
                self._board.close()

    @contextlib.contextmanager
    def _board_guarded(self) -> Any:
        """Within this context an error of TensorBoard only turns TensorBoard off.

        TensorBoard writes in a thread. An error there ends the thread and is raised by the next call.
        """
        try:
            yield
        except Exception as error:  # OSError, or TensorFlow's own errors if TensorFlow is installed
            self._board = None
            self.console(f"TensorBoard's files lack what follows: {error}")


def train_line(step: int, total: int, values: dict[str, Any]) -> str:
    """The line that the console shows for one step."""
    seconds = (total - step) * values["seconds"]
    eta = f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"step {step:>{len(str(total))}}/{total}  loss {values['loss']:.4f}  "
        f"grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
        f"{values['tokens_per_second']:,.0f} tokens/s{mfu}  eta {eta}"
    )
