"""A session of Python: a block runs in the sandbox after the earlier ones, whose output is hidden."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_post.sandbox.languages import Code
from megatron_post.sandbox.outcome import Outcome

_DRIVER = Path(__file__).with_name("session_driver.py")
_END = "\n(end of session)\n"  # the driver writes it last; without it a block has ended the interpreter


def session(blocks: Sequence[str]) -> Code:
    """The program that runs these blocks in order, and shows the output of the last one."""
    files: dict[str, str | bytes] = {
        "session.py": _DRIVER.read_text(encoding="utf-8"),
        "blocks.json": json.dumps({"blocks": list(blocks), "end": _END}),
    }
    return Code(files, ("env", "PYTHONHASHSEED=0", "python3", "session.py"))


def has_ended(outcome: Outcome) -> bool:
    """Whether a block has ended the interpreter, so that what came after it did not run."""
    return outcome.kind in ("passed", "failed") and not outcome.stderr.endswith(_END)


def reached_limit(outcome: Outcome) -> bool:
    """Whether the session was killed. Its last block must not be replayed."""
    return outcome.kind not in ("passed", "failed")


def shown(outcome: Outcome, *, most: int) -> str:
    """The output as Meta's code interpreter gives it to the model. most: characters of each stream."""
    status = {"passed": "completed", "failed": "error"}.get(outcome.kind, outcome.kind)
    streams = {"stdout": outcome.stdout, "stderr": outcome.stderr.removesuffix(_END)}
    parts = [status]
    for name, text in streams.items():
        if text := text.strip("\n"):
            left = len(text) - most
            text = f"{text[:most]}\n[{left} more characters]" if left > 0 else text
            parts += [f"[{name}]", text, f"[/{name}]"]
    return "\n".join(parts)
