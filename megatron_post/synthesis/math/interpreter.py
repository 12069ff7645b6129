"""Runs a block of a Python session in the sandbox, after the earlier blocks, whose output is hidden."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.data.dialog import CODE_INTERPRETER, ToolCall
from megatron_post.sandbox.outcome import Outcome
from megatron_post.synthesis.programs import Files

_DRIVER = Path(__file__).with_name("session_driver.py")
_END = "\n(end of session)\n"  # the driver's last output, missing if a block ended the interpreter


def session(blocks: Sequence[str]) -> tuple[Files, tuple[str, ...]]:
    """The program that runs these blocks in order and shows the output of the last block."""
    names = [f"block_{number}.py" for number in range(1, len(blocks) + 1)]
    files: Files = {_DRIVER.name: _DRIVER, **dict(zip(names, blocks, strict=True))}
    return files, ("env", "PYTHONHASHSEED=0", "python3", _DRIVER.name, *names)


def code_of(call: ToolCall) -> str | None:
    """The code of a call of the interpreter, or None for another call or other arguments.

    A server gives the arguments as JSON, or the bare code.
    """
    if call.name != CODE_INTERPRETER:
        return None
    values: Any = call.arguments
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError):
            return str(call.arguments)
        if not isinstance(values, dict):  # such as the code 42
            return str(call.arguments)
    code = values["code"] if list(values) == ["code"] else None
    return code if isinstance(code, str) else None


def has_ended(outcome: Outcome) -> bool:
    """Whether a block has ended the interpreter, so that the later blocks did not run."""
    return outcome.kind in ("passed", "failed") and not outcome.stderr.endswith(_END)


def reached_limit(outcome: Outcome) -> bool:
    """Whether the session was killed. Its last block must not be replayed."""
    return outcome.kind not in ("passed", "failed")


def shown(outcome: Outcome, *, most: int) -> str:
    """The output in the form of Meta's code interpreter. most: characters that are kept of each stream."""
    status = {"passed": "completed", "failed": "error"}.get(outcome.kind, outcome.kind)
    streams = {"stdout": outcome.stdout, "stderr": outcome.stderr.removesuffix(_END)}
    parts = [status]
    for name, text in streams.items():
        if text := text.strip("\n"):
            left = len(text) - most
            text = f"{text[:most]}\n[{left} more characters]" if left > 0 else text
            parts += [f"[{name}]", text, f"[/{name}]"]
    return "\n".join(parts)
