"""Kills `curate` at every access to a file while it writes the rows, the mixture and the page.

python -m tests.faults.killed_selection DIRECTORY STRIDE  # prints how many moments there are and were tried

Two curations have the same columns and other mixtures. Each of them is killed over the finished files of the
other one, and then resumed. The runs fork from this process, which has imported everything.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_post.curation.run import curate
from megatron_post.curation.settings import load_curation
from megatron_post.display import make_console

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def main() -> None:
    directory, stride = Path(sys.argv[1]), int(sys.argv[2])
    run = directory / "run"
    configs = [_config(directory, number) for number in range(2)]
    assert _killed_at(configs[0], run, None) > 0
    finished = []
    for config in configs[::-1]:  # the columns are there, so both begin with the selection
        moments = _killed_at(config, run, None)
        finished.insert(0, _files(run))
    assert finished[0].keys() == finished[1].keys() >= {"report.html", "mixture/preferences.yaml"}
    previous, tried = 0, 0
    for moment in itertools.count(1, stride):
        this = 1 - previous
        if _killed_at(configs[this], run, moment) < moment:
            break
        tried += 1
        _check(_files(run), finished[previous], finished[this], moment)
        _killed_at(configs[this], run, None)
        assert _files(run) == finished[this], f"resumed after moment {moment}"
        previous = this
    print(json.dumps({"moments": moments, "tried": tried}))


def _config(directory: Path, number: int) -> Path:
    rows: list[dict[str, Any]] = []
    for n in range(40):
        roles = zip(("user", "assistant"), (f"question {n % 37}", f"answer {n % 37}"), strict=True)
        rows.append({"messages": [{"role": role, "content": text} for role, text in roles]})
    pairs = [{"prompt": f"ask {n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    sources = {"chat": rows, "pairs": pairs}
    for name, values in sources.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    settings = {
        "run": str(directory / "run"),
        "sources": [{"name": name, "path": str(directory / f"{name}.jsonl")} for name in sources],
        "part_rows": 16,
        "steps": [{"kind": "lengths", "least_characters": 9}, {"kind": "exact_duplicates"}],
        "mixture": {
            "categories": [
                {"name": "Pairs", "sources": ["pairs"], "share": 1 + number},
                {"name": "Chat", "sources": ["chat"], "share": 1},
            ]
        },
    }
    path = directory / f"curation-{number}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _killed_at(config: Path, run: Path, moment: int | None) -> int:
    """Curate in a process that is killed at this access during the selection, from 1. None: it is not killed.

    Returns the number of accesses, or `moment` if it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            count = _curate_until(config, run, moment)
            os.write(writing, str(count).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count = int(pipe.read() or 0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended == -signal.SIGKILL and moment is not None:
        return moment
    assert ended == 0, ended
    return count


def _curate_until(config: Path, run: Path, moment: int | None) -> int:
    """Returns the number of accesses to files of the run during the selection."""
    count, is_selecting = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if is_selecting and event in _EVENTS and str(arguments[0]).startswith(str(run)):
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def begins(name: str) -> None:
        nonlocal is_selecting
        is_selecting = is_selecting or name == "selection"

    sys.addaudithook(hook)
    curate(load_curation(str(config)), rank=0, size=1, console=make_console(quiet=True), begins=begins)
    return count


def _files(run: Path) -> dict[str, bytes]:
    """Every file but locks, also those that a writer has left."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def _check(found: dict[str, bytes], before: dict[str, bytes], after: dict[str, bytes], moment: int) -> None:
    """Each file is that of one of the two runs, and a report means that all files are of its run."""
    visible = {name: content for name, content in found.items() if not Path(name).name.startswith(".")}
    torn = [name for name, content in visible.items() if content not in (before[name], after[name])]
    assert not torn, (moment, torn)
    if "report.json" in visible:
        assert visible in (before, after), moment


if __name__ == "__main__":
    main()
