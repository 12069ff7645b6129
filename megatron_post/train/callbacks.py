"""Functions that a run calls after its steps, evaluations and saves.

The run's own reports are callbacks too (`metrics.MetricsWriter`), and are called before those of a user. Only
the rank that reports calls them: the first rank of the last pipeline stage, which is rank 0 without pipeline
parallelism. Only this stage has losses.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Callback:
    """Derive a class and override what you need. Each method is called on the reporting rank only.

    Training waits while a method runs, and the time counts to no step. Methods must not communicate with
    other ranks. An exception ends the run with a `CallbackFailed`.
    """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Called after an optimizer step, with its loss, gradient norm, learning rate and throughput.

        A step whose packs were skipped because they are not finite has no call.
        """

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        """Called after an evaluation, with the mean metrics over the held-out packs."""

    def on_save(self, step: int, directory: Path) -> None:
        """Called after the checkpoint of a step has appeared on the disk, whole.

        With `checkpoint.asynchronous` training goes on meanwhile, so this may be some steps later.
        """


class CallbackFailed(ValueError):
    """A callback of the user raised an exception, which is the cause of this one."""


def checked(callbacks: Sequence[Callback]) -> list[Callback]:
    """Callbacks that raise `CallbackFailed` with their name and step in place of any other exception.

    Raises `ValueError` for anything but a sequence of callbacks.
    """
    if not isinstance(callbacks, Sequence):
        raise ValueError(f"callbacks={callbacks!r}: give a list of callbacks")
    for number, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks[{number}] is {callback!r}: give an object of a class that is derived from "
                "megatron_post.api.Callback"
            )
    return [_Checked(callback) for callback in callbacks]


class _Checked(Callback):
    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._call(self._callback.on_step, step, dict(values))

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._call(self._callback.on_evaluate, step, dict(values))

    def on_save(self, step: int, directory: Path) -> None:
        self._call(self._callback.on_save, step, directory)

    def _call(self, method: Callable[[int, Any], None], step: int, value: Any) -> None:
        try:
            method(step, value)
        except Exception as error:
            name = f"{type(self._callback).__name__}.{method.__name__}"
            raise CallbackFailed(
                f"callback {name} failed after step {step}: {type(error).__name__}: {error}. Correct it and "
                "start the run again: it continues after its newest checkpoint"
            ) from error
