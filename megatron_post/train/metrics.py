"""Reports each step of a run as a JSON line, to trackers, and as a line on the console."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_post.config.sections import Train
from megatron_post.display import say
from megatron_post.train.callbacks import Callback
from megatron_post.train.history import METRICS, STARTS
from megatron_post.train.step_lines import StepLines
from megatron_post.train.trackers import Tracker


class MetricsWriter(Callback):
    """Writes to `run_dir` on the one rank that reports. On other ranks every call does nothing.

    If the disk is full, the run goes on and the metrics are lost. trackers: also get every step. may_write:
    see `StepLines`. ranks, device: of this incarnation, for the record of its start.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        active: bool,
        trackers: Sequence[Tracker] = (),
        may_write: Callable[[], bool] = lambda: True,
        ranks: int = 1,
        device: str = "",
    ) -> None:
        self._active, self._may_write = active, may_write
        self._lines = StepLines(Path(run_dir) / METRICS, may_write=may_write)
        self._starts = StepLines(Path(run_dir) / STARTS, may_write=may_write)
        self._place = {"ranks": ranks, "device": device}
        self._trackers = list(trackers) if active else []

    def begin(self, *, after: int) -> None:
        """Continue the run after step `after`.

        Lines of later steps are removed. They are steps that the run has lost, and their number is recorded.
        """
        if not self._active:
            return
        written = self._lines.cut_back(after)
        lost = max(0, written.get("train", 0) - after)
        self._starts.write(time=time.time(), after=after, lost=lost, **self._place)
        self._each(lambda tracker: tracker.begin(after=after, written=written))

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.write("train", step, values)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self.write("eval", step, values)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step. kind: "train" or "eval"."""
        if not self._active:
            return
        self._lines.write(kind=kind, step=step, time=time.time(), **values)
        if self._may_write():
            self._each(lambda tracker: tracker.write(kind, step, dict(values)))

    def console(self, text: str) -> None:
        if self._active:
            with contextlib.suppress(OSError):  # the log's disk may be full, or the terminal closed
                say(text)

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """Call a method of every tracker. An error only turns that tracker off.

        TensorBoard writes in a thread. An error there ends the thread and is raised by the next call.
        """
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # OSError, or an error of the tracker's own package
                self._trackers.remove(tracker)
                self.console(f"{tracker.name} lacks what follows: {error}")


class ConsoleLines(Callback):
    """Prints a line for every `train.log_every` steps, for the last step, and for each evaluation."""

    def __init__(self, settings: Train, console: Callable[[str], None]) -> None:
        self._settings, self._console = settings, console

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        steps = self._settings.steps
        if step == steps or step % self._settings.log_every == 0:
            self._console(train_line(step, steps, values))

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._console(f"step {step}  held out: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))


def train_line(step: int, total: int, values: Mapping[str, Any]) -> str:
    """The line that the console shows for one step."""
    seconds = (total - step) * values["seconds"]
    eta = f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"step {step:>{len(str(total))}}/{total}  loss {values['loss']:.4f}  "
        f"grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  "
        f"{values['tokens_per_second']:,.0f} tokens/s{mfu}  eta {eta}"
    )
