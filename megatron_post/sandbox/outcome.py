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
    "files",  # open ones
    "output",
    "killed",  # by a signal which no limit of ours sent
    "unavailable",  # the shell's exit status 127: a tool is missing
]
_UNAVAILABLE, _SIGNALLED = 127, 128  # a shell's exit statuses: no such command, and 128 + the signal's number
_LIMITS: dict[int, Kind] = {signal.SIGXCPU: "timeout", signal.SIGXFSZ: "disk"}


@dataclass(frozen=True)
class Outcome:
    """stdout, stderr: as much as the limit allows. What is not UTF-8 is replaced.

    A program chooses its exit status and its output. It can pretend every kind that has no limit of ours in
    it, and it can exit with 0 before it has done anything.
    """

    kind: Kind
    returncode: int  # of a shell: 128 + n where signal n ended it
    stdout: str
    stderr: str
    seconds: float  # by the clock

    @property
    def ok(self) -> bool:
        return self.kind == "passed"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Outcome":
        """Raises `ValueError` for what `as_json` did not write."""
        try:
            outcome = cls(**entry)
        except TypeError as error:
            raise ValueError(f"{entry} is not the outcome of a program: {error}") from None
        if outcome.kind not in get_args(Kind):
            raise ValueError(f"{outcome.kind!r} is no kind of outcome; there are {', '.join(get_args(Kind))}")
        return outcome


def kind_of(returncode: int) -> Kind:
    """What an exit status says, where no limit of ours was exceeded."""
    if returncode == 0:
        return "passed"
    if returncode == _UNAVAILABLE:
        return "unavailable"
    number = returncode - _SIGNALLED
    if number in _LIMITS:
        return _LIMITS[number]
    return "killed" if number in set(signal.Signals) else "failed"
