"""Records the finished steps of a run of rounds in a small file, which is always replaced as a whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.rounds.settings import RoundSettings
from megatron_post.storage.files import write_json
from megatron_post.storage.reading import read_object, reading


class State:
    """`state.json` in the run's directory."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        """settings: the settings that must stay the same. Raises `ValueError` if the file has others."""
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
        """The seconds that each finished step took, in the order of their execution."""
        return dict(self._content["done"])

    def remaining(self, steps: Sequence[str]) -> Sequence[str]:
        """The steps after the last finished one.

        A chain's jobs on ranks do not record themselves. But each started after all earlier ones had
        finished.
        """
        done = [number for number, step in enumerate(steps, start=1) if step in self.done]
        return steps[max(done, default=0) :]

    def finish(self, step: str, seconds: float) -> None:
        self._content["done"][step] = round(seconds, 1)
        write_json(self._path, self._content)

    def forget(self, steps: Sequence[str]) -> None:
        """Mark steps as not finished."""
        for step in steps:
            self._content["done"].pop(step, None)
        write_json(self._path, self._content)


def state_of(settings: RoundSettings) -> State:
    """The record of a run. Settings for more rounds, other ranks and fewer answers may change later."""
    values = settings.model_dump_json(
        exclude={
            "rounds": True,
            "ranks": True,
            "ranks_per_node": True,
            "generate": {"copies", "max_failed"},
            "annotate": {"enough"},
        }
    )
    return State(Path(settings.run_dir), json.loads(values))
