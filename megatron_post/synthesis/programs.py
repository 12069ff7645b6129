"""A sandbox whose outcomes are kept in the journal, so that a replay does not depend on timing."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_post.inference.journal import Journal, key_of
from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.sandbox import Sandbox
from megatron_post.sandbox.settings import Bubblewrap, Container, Limits
from megatron_post.sandbox.supervise import BrokenSandbox

# A path names a script or a tool that many programs share. The journal keeps its checksum, not its content.
Files = Mapping[str, str | bytes | Path]


class JournalledSandbox:
    """Runs each program once. Equal files, command and limits get the outcome in the journal."""

    def __init__(self, sandbox: Sandbox, settings: Bubblewrap | Container, journal: Journal) -> None:
        """settings: those of the sandbox. The settings that a program can observe are a part of the key."""
        self._sandbox, self._journal, self._limits = sandbox, journal, settings.limits
        self._held = settings.model_dump(mode="json", exclude={"programs", "limits"})
        self._shared: dict[Path, tuple[bytes, str]] = {}  # content and checksum of each path, read once
        self.error: BrokenSandbox | None = None

    async def run(self, files: Files, command: Sequence[str], limits: Limits | None) -> tuple[Outcome, str]:
        """The outcome and its key in the journal. Raises what the sandbox raises."""
        program = {
            "files": {name: self._as_json(content) for name, content in files.items()},
            "command": list(command),
            "limits": (limits or self._limits).model_dump(mode="json"),
        }
        key = key_of(sandbox=self._held, **program)

        async def make() -> tuple[str, dict[str, Any]]:
            try:
                outcome = await self._sandbox.run(self._content(files), command, limits)
            except BrokenSandbox as error:
                self.error = error
                raise
            return "program", {"program": program, "outcome": outcome.as_json()}

        entry = await self._journal.once(key, make)
        return Outcome.from_json(entry["outcome"]), key

    def _content(self, files: Files) -> dict[str, str | bytes]:
        return {
            name: self._read(content)[0] if isinstance(content, Path) else content
            for name, content in files.items()
        }

    def _as_json(self, content: str | bytes | Path) -> str | dict[str, Any]:
        if isinstance(content, Path):
            return {"script": content.name, "sha256": self._read(content)[1]}
        return content if isinstance(content, str) else {"base64": base64.b64encode(content).decode()}

    def _read(self, path: Path) -> tuple[bytes, str]:
        if path not in self._shared:
            content = path.read_bytes()
            self._shared[path] = content, hashlib.sha256(content).hexdigest()
        return self._shared[path]
