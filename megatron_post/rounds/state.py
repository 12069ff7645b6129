"""Which steps of a run of rounds are done: one small file, replaced as a whole."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_post.storage.files import full_disk_explained, write_json
from megatron_post.storage.lock import locked
from megatron_post.storage.reading import read_object, reading


class State:
    """`state.json` in the run's directory."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        """settings: what must be the same whenever the run goes on. Raises `ValueError` where they differ."""
        self._path = run_dir / "state.json"
        if not self._path.is_file():
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"settings": settings, "done": {}})
        with reading(self._path, "the record of a run of rounds; choose another run_dir"):
            self._content = read_object(self._path, "the record of a run of rounds; choose another run_dir")
            found, done = dict(self._content["settings"]), dict(self._content["done"])
            self._content["done"] = done
        changed = sorted(k for k in {*settings, *found} if settings.get(k) != found.get(k))
        if changed:
            raise ValueError(
                f"{self._path} is of a run with other {', '.join(changed)}; undo the change, or choose "
                "another run_dir"
            )

    @property
    def done(self) -> dict[str, float]:
        """Step -> seconds that it took, in the order in which they were done."""
        return dict(self._content["done"])

    def left(self, steps: Sequence[str]) -> Sequence[str]:
        """Of all steps those behind the last that is done: a chain's jobs on ranks leave no mark of their
        own, and each began when all before it were done."""
        done = [number for number, step in enumerate(steps, start=1) if step in self.done]
        return steps[max(done, default=0) :]

    def finish(self, step: str, seconds: float) -> None:
        self._content["done"][step] = round(seconds, 1)
        write_json(self._path, self._content)

    def forget(self, steps: Sequence[str]) -> None:
        """These steps are no longer done."""
        for step in steps:
            self._content["done"].pop(step, None)
        write_json(self._path, self._content)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[int]:
    """Hold the lock of a run, or of what a command writes; gives the lock's file descriptor.

    It ends with this process, and with those that inherit the descriptor. A file system without locks gives
    it to everybody. Raises `ValueError` where another process has it.
    """
    with full_disk_explained(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    with file:
        if not locked(file, wait=False):
            raise ValueError(
                f"{run_dir}: another process works here, or a step of one that was killed still does; "
                "wait for it, or end it"
            )
        yield file.fileno()
