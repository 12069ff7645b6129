"""Whether a file that was written again passes the tests of its repository, in the sandbox."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_post.synthesis.code.scripts import script
from megatron_post.synthesis.task import Files, Task

_COUNT = re.compile(r"\b(?:Ran (\d+) tests?|(\d+) passed)\b")


class OwnTests:
    """The tests of one repository. They count if they pass with a file, and fail without it."""

    def __init__(self, task: Task[Any], command: Sequence[str], files: Mapping[str, str], path: str) -> None:
        """command: runs the tests in the directory of the repository. path: of the file that is missing."""
        self._task, self._command, self._files, self._path = task, command, files, path
        self._passed: str | None = None

    async def find(self) -> bool:
        """Whether there are tests that need the file. The report counts why there are none."""
        self._passed = await self._count("own_tests", self._files[self._path])
        if self._passed is None:
            self._task.count("own_tests", "they do not pass with the file")
        elif await self._count("own_tests", None) is not None:
            self._task.count("own_tests", "they pass without the file")
            self._passed = None
        return self._passed is not None

    async def pass_with(self, text: str) -> bool:
        """Whether as many tests pass with this text of the file as with its own."""
        return self._passed is not None and await self._count("tests", text) == self._passed

    async def _count(self, step: str, text: str | None) -> str | None:
        """How many tests passed, as their runner says; None if one did not, or if there was none."""
        shown = {name: content for name, content in self._files.items() if name != self._path}
        if text is not None:
            shown[self._path] = text
        program: Files = {"in_repository.py": script("in_repository.py"), "files.json": json.dumps(shown)}
        outcome = await self._task.run(step, program, ("python3", "in_repository.py", *self._command))
        found = _COUNT.findall(outcome.stdout + outcome.stderr) if outcome.ok else []
        count = "".join(found[-1]) if found else "0"
        return count if int(count) else None
