"""How a program ended."""

import signal
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Kind = Literal[
    "passed",  # exit status 0
    "failed",  # another exit status
    "timeout",  # the clock or the processor time
    "memory",
    "disk",
    "processes",
    "files",  # too many open files
    "output",
    "killed",  # by a signal that does not come from a limit
    "unavailable",  # the shell's exit status 127: a tool is missing
]
_UNAVAILABLE, _SIGNALLED = 127, 128  # a shell's exit statuses for a missing command, and 128 + a signal
_LIMITS: dict[int, Kind] = {signal.SIGXCPU: "timeout", signal.SIGXFSZ: "disk"}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    A program chooses its exit status and its output. So it can imitate every kind that the watcher does not
    detect, and it can exit with 0 before it has done anything. stdout, stderr: as much as the limit allows.
    Bytes that are not UTF-8 are replaced.
    """

    kind: Kind
    returncode: int  # as in a shell, 128 + n if signal n ended the program
    stdout: str
    stderr: str
    seconds: float  # wall-clock time

    @property
    def ok(self) -> bool:
        return self.kind == "passed"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Outcome":
        """The outcome that `as_json` wrote. Raises `ValueError` for other values."""
        try:
            outcome = cls(**entry)
        except TypeError as error:
            raise ValueError(f"{entry} is not the outcome of a program: {error}") from None
        if outcome.kind not in get_args(Kind):
            raise ValueError(
                f"{outcome.kind!r} is not a kind of outcome. The kinds are {', '.join(get_args(Kind))}"
            )
        return outcome


def kind_of(returncode: int) -> Kind:
    """The kind of an outcome by its exit status, if the watcher found no limit exceeded."""
    if returncode == 0:
        return "passed"
    if returncode == _UNAVAILABLE:
        return "unavailable"
    number = returncode - _SIGNALLED
    if number in _LIMITS:
        return _LIMITS[number]
    return "killed" if number in set(signal.Signals) else "failed"
