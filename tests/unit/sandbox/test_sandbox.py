"""What a sandbox promises to the code that calls it."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_post.sandbox import processes
from megatron_post.sandbox.outcome import Outcome, kind_of
from megatron_post.sandbox.sandbox import Sandbox, open_sandbox
from megatron_post.sandbox.settings import Bubblewrap, Container, Limits

PYTHON = ("python3", "main.py")


def _run(sandbox: Sandbox, source: str, limits: Limits | None = None, **files: str | bytes) -> Outcome:
    return asyncio.run(sandbox.run({"main.py": source, **files}, PYTHON, limits))


def test_a_program_sees_its_files_alone(sandbox: Sandbox) -> None:
    files = {
        "main.py": "import os\nprint(sorted(os.listdir()), open('a/b.txt', 'rb').read())",
        "a/b.txt": b"\xff",
    }
    outcome = asyncio.run(sandbox.run(files, PYTHON))
    assert outcome.stdout == "['a', 'main.py'] b'\\xff'\n"


def test_a_program_changes_its_own_copy_of_a_file(sandbox: Sandbox) -> None:
    source = "f = open('data', 'r+')\nprint(f.read())\nf.seek(0)\nf.write('changed')"
    assert [_run(sandbox, source, data="first").stdout for _ in range(2)] == ["first\n", "first\n"]


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a//b", "./x", ".", "", "a/", "x\0y", "x\ny", "..", "n" * 256,
     "a/" * 200 + "b", "\ud800"],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused_before_anything_runs(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sandbox, "_run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="is not the name of a file"):
        asyncio.run(sandbox.run({name: ""}, ["true"]))


def test_files_that_cannot_be_laid_down_are_refused(sandbox: Sandbox) -> None:
    small = Limits(disk_mib=1)
    for files, reason in (
        ({"a": "", "a/b": ""}, "'a' is a file and cannot be the directory"),
        ({"a": b"x" * 2**20}, "limits.disk_mib is 1"),
        ({str(i): "" for i in range(257)}, "257 files"),
    ):
        with pytest.raises(ValueError, match=reason):
            asyncio.run(sandbox.run(files, ["true"], small))
    for command in ([], [""], ["a\0b"], ["x" * 200_000], "true"):
        with pytest.raises(ValueError, match="command"):
            asyncio.run(sandbox.run({}, command))


def test_many_files_and_few_open_ones(sandbox: Sandbox) -> None:
    """bubblewrap holds each file open until it is laid down, whatever the program's own limit is."""
    files = {f"{i}": "" for i in range(256)}
    outcome = asyncio.run(sandbox.run(files, ["sh", "-c", "ls | wc -l; ulimit -n"], Limits(open_files=16)))
    assert outcome.stdout.split() == ["256", "16"]


def test_descriptors_above_1023_are_no_obstacle(sandbox: Sandbox) -> None:
    """A process with thousands of requests in flight has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert asyncio.run(sandbox.run({"a": "x"}, ["cat", "a"])).stdout == "x"
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bubblewrap_s_own_process_is_hidden(sandbox: Sandbox) -> None:
    """A program could read deleted files in its memory, and change it: both have the same rights."""
    assert _run(sandbox, "import os\nprint(os.listdir('/proc/1'), os.getppid())").stdout == "[] 1\n"


def test_text_that_no_file_can_hold_as_utf_8_is_run_all_the_same(sandbox: Sandbox) -> None:
    """A model's reply in JSON can hold half of a surrogate pair."""
    outcome = _run(sandbox, "print('\ud800')")
    assert outcome.kind == "failed" and "SyntaxError" in outcome.stderr


def test_programs_do_not_see_each_other(sandbox: Sandbox) -> None:
    hide = "import time\nopen('/tmp/found', 'w').write('secret')\nprint('ready')\ntime.sleep(1.0)"
    seek = (
        "import os, time\ntime.sleep(0.4)\nprint(os.path.exists('/tmp/found'), "
        "sum(name.isdigit() for name in os.listdir('/proc')))"
    )

    async def both() -> list[Outcome]:
        return await asyncio.gather(*(sandbox.run({"main.py": text}, PYTHON) for text in (hide, seek)))

    hidden, sought = asyncio.run(both())
    assert hidden.ok and sought.stdout == "False 2\n"  # pid 1 and itself


def test_a_cancelled_program_is_killed(sandbox: Sandbox) -> None:
    async def cancel() -> float:
        task = asyncio.create_task(sandbox.run({}, ["sleep", "1000"]))
        while not set(processes.descendants(os.getpid())) - before:
            await asyncio.sleep(0.02)
        task.cancel()
        begun = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begun

    before = set(processes.descendants(os.getpid()))
    assert asyncio.run(cancel()) < 20
    assert set(processes.descendants(os.getpid())) <= before


def test_a_program_that_waits_for_its_turn_is_cancelled_at_once(sandbox: Sandbox) -> None:
    async def cancel() -> int:
        tasks = [asyncio.create_task(sandbox.run({}, ["sleep", "0.5"])) for _ in range(4)]
        await asyncio.sleep(0.1)
        for task in tasks[2:]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return sum(isinstance(each, asyncio.CancelledError) for each in done)

    assert asyncio.run(cancel()) == 2


def test_no_more_programs_run_at_a_time_than_the_settings_say(sandbox: Sandbox) -> None:
    """Two, of half a second each: four take a second."""

    async def four() -> float:
        begun = time.monotonic()
        await asyncio.gather(*(sandbox.run({}, ["sleep", "0.5"]) for _ in range(4)))
        return time.monotonic() - begun

    assert asyncio.run(four()) >= 1.0


def test_programs_end_with_the_process_that_started_them(sandbox: Sandbox, tmp_path: Path) -> None:
    token = f"1000.{os.getpid()}"
    script = (
        "import asyncio\nfrom megatron_post.sandbox.sandbox import open_sandbox\n"
        "from megatron_post.sandbox.settings import Bubblewrap\n"
        f"asyncio.run(open_sandbox(Bubblewrap()).run({{}}, ['sleep', '{token}']))"
    )
    client = subprocess.Popen([sys.executable, "-c", script])
    try:
        _wait_for(lambda: _sleeping(token))
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
    _wait_for(lambda: not _sleeping(token))


def _sleeping(token: str) -> bool:
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", token.encode()]:
            return True
    return False


def _wait_for(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hundred_programs_a_minute_on_one_core(sandbox: Sandbox) -> None:
    """Twenty in twelve seconds. An idle core runs them in less than one."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with open_sandbox(Bubblewrap(programs=1)) as opened:
            begun = time.monotonic()

            async def twenty() -> list[Outcome]:
                return await asyncio.gather(
                    *(opened.run({"main.py": f"print({i})"}, PYTHON) for i in range(20))
                )

            assert [outcome.stdout for outcome in asyncio.run(twenty())] == [f"{i}\n" for i in range(20)]
            assert time.monotonic() - begun < 12
    finally:
        os.sched_setaffinity(0, cores)


def test_what_is_read_only_can_be_read_and_not_written(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "helper.py").write_text("answer = 42")
    settings = Bubblewrap(programs=1, read_only=(str(tmp_path),), environment={"PYTHONPATH": str(tmp_path)})
    with open_sandbox(settings) as opened:
        outcome = _run(opened, f"import helper\nprint(helper.answer)\nopen('{tmp_path}/x', 'w')")
    assert outcome.stdout == "42\n" and "Read-only file system" in outcome.stderr


def test_python_packages_of_the_host_are_not_seen(sandbox: Sandbox) -> None:
    assert "No module named 'pydantic'" in _run(sandbox, "import pydantic").stderr


def test_an_outcome_is_json_and_back() -> None:
    outcome = Outcome("failed", 3, "a", "b", 0.5)
    assert Outcome.from_json(outcome.as_json()) == outcome and not outcome.ok
    for wrong in (
        {"kind": "passed"},
        {**outcome.as_json(), "kind": "fine"},
        {**outcome.as_json(), "more": 1},
    ):
        with pytest.raises(ValueError):
            Outcome.from_json(wrong)


def test_exit_statuses_have_a_shell_s_meaning() -> None:
    """128 + 24 is SIGXCPU and 128 + 25 is SIGXFSZ: the kernel sends them at a limit. Signals end at 64."""
    statuses = {0: "passed", 1: "failed", 127: "unavailable", 128: "failed", 137: "killed", 139: "killed",
                152: "timeout", 153: "disk", 192: "killed", 193: "failed", 255: "failed"}  # fmt: skip
    assert {status: kind_of(status) for status in statuses} == statuses


def test_without_bubblewrap_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"bwrap.* cannot be found; .*bubblewrap.*sandbox\.kind=command"):
        open_sandbox(Bubblewrap())


def test_where_namespaces_are_forbidden_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in prints what bubblewrap does in a container without user namespaces. Like bubblewrap after
    some errors, it leaves a process behind."""
    token, reason = f"2000.{os.getpid()}", "bwrap: No permissions to create new namespace"
    with tempfile.TemporaryDirectory() as place:  # every user can reach it, as pytest's own nobody else can
        os.chmod(place, 0o755)
        (Path(place) / "bwrap").write_text(
            f"#!/bin/sh\n[ $1 = --help ] && exit\nsleep {token} &\necho '{reason}' >&2\nexit 1\n"
        )
        (Path(place) / "bwrap").chmod(0o755)
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
        with pytest.raises(ValueError, match=rf"does not work: .*{reason}; .* kernel\.unprivileged"):
            open_sandbox(Bubblewrap())
    assert not _sleeping(token)


def test_settings_that_cannot_work_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="is not an absolute path"):
        Bubblewrap(read_only=("x",))
    for wrong in ({"A=B": "x"}, {"": "x"}, {"1A": "x"}, {"A\n": "x"}, {"A": "x\0"}):
        with pytest.raises(ValueError, match="environment"):
            Bubblewrap(environment=wrong)
    with pytest.raises(ValueError, match="/no/such is not a directory"):
        open_sandbox(Bubblewrap(read_only=("/no/such",)))
    with pytest.raises(ValueError, match=r"\{file\}.*\{directory\}"):
        Container(kind="command", command=("docker", "{file}"))
    with pytest.raises(ValueError, match="no-such-tool cannot be found"):
        open_sandbox(Container(kind="command", command=("no-such-tool",)))
