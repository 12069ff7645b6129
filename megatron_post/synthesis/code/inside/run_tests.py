"""Runs tests that a model wrote on a program that a model wrote, each in a process of its own.

It reads tests.py and job.json, {"nonce": ..., "build": ..., "run": ..., "seconds": ...}. The program is in
the directory `program`. The report is one line of standard output, the nonce and JSON.

The program must not be able to write that line. It could write to the standard output of another process, by
/proc, and so it must not learn the nonce, nor see the tests before it has answered them. Both are read and
deleted before the program is built. This process cannot be inspected by others of its user.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import tempfile
from typing import IO, Any

_PR_SET_DUMPABLE = 4  # linux/prctl.h; with 0, the files of this process in /proc are closed to the program
_MOST_MESSAGE = 2000  # characters of a message in the report
_MOST_RUNS = 64  # runs in the report, the last ones
_WHOLE_RUNS, _KEPT, _KEPT_OF_OTHERS = 3, 1000, 100  # the last runs have more characters of each text
_MOST_BYTES = 2**20  # of an output that is read
_DIRECTORY = "program"


class Result:
    """What the tests see of a run. returncode: negative where a signal ended the program."""

    def __init__(self, stdout: str, stderr: str, returncode: int) -> None:
        self.stdout, self.stderr, self.returncode = stdout, stderr, returncode

    def __repr__(self) -> str:
        return f"Result(stdout={self.stdout!r}, stderr={self.stderr!r}, returncode={self.returncode})"


class _Hang(AssertionError):
    """The program has not ended in its time."""


class _Bench:
    """Runs the program, and remembers the runs of one test."""

    def __init__(self, command: str, seconds: float) -> None:
        self._command, self._seconds = command, seconds
        self.runs: list[dict[str, Any]] = []
        self.hung = False  # whatever the tests make of the exception

    def run(self, stdin: str = "", *arguments: str) -> Result:
        """`run` of the tests."""
        with contextlib.ExitStack() as stack:
            # files and no pipes: a child that the program leaves behind would hold a pipe open
            given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(stdin.encode(errors="surrogatepass"))
            given.seek(0)
            returncode = self._wait([f'{self._command} "$@"', "sh", *map(str, arguments)], given, out, err)
            if not os.statvfs(tempfile.gettempdir()).f_bavail:
                # The sandbox ends a program with a full disk. Without the wait it could look too late.
                signal.pause()
            result = Result(_text(out), _text(err), returncode)
            digest = _digest(out)
        self.runs.append(
            {
                "stdin": stdin[:_KEPT],
                "arguments": " ".join(map(str, arguments))[:_KEPT],
                "stdout": result.stdout[:_KEPT],
                "stderr": result.stderr[-_KEPT:],
                "returncode": returncode,
                "printed": bool(result.stdout.strip()),
                "digest": digest,
            }
        )
        if self.hung:
            raise _Hang(f"the program did not end within {self._seconds:g} seconds")
        return result

    def _wait(self, words: list[str], given: IO[bytes], out: IO[bytes], err: IO[bytes]) -> int:
        process = subprocess.Popen(
            ["sh", "-c", *words], stdin=given, stdout=out, stderr=err, cwd=_DIRECTORY, start_new_session=True
        )
        try:
            return process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            self.hung = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def last_runs(self) -> list[dict[str, Any]]:
        """The runs for a report, whose size is bounded."""
        found = self.runs[-_MOST_RUNS:]
        short = [
            {
                name: value[:_KEPT_OF_OTHERS] if isinstance(value, str) and name != "digest" else value
                for name, value in run.items()
            }
            for run in found[:-_WHOLE_RUNS]
        ]
        return short + found[-_WHOLE_RUNS:]


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MOST_BYTES).decode(errors="replace")


def _digest(file: IO[bytes]) -> str:
    """A digest of a whole output, without blanks at the ends of lines and of the output.

    Bytes are compared, because different bytes that are not UTF-8 become the same text.
    """
    file.seek(0)
    digest, end = hashlib.sha256(), b""
    for line in file:
        content = line.rstrip()
        if content:
            digest.update(end + content)
            end = b""
        end += b"\n"
    return digest.hexdigest()


def _report(job: dict[str, Any], tests_text: str) -> dict[str, Any]:
    build = subprocess.run(
        ["sh", "-c", job["build"]], stdin=subprocess.DEVNULL, capture_output=True, cwd=_DIRECTORY
    )
    if build.returncode:
        message = (build.stderr + build.stdout).decode(errors="replace")
        kind = "unavailable" if build.returncode == 127 else "build"
        return {"kind": kind, "message": message[:_MOST_MESSAGE]}
    bench = _Bench(job["run"], job["seconds"])
    names: dict[str, Any] = {"run": bench.run, "__name__": "tests"}
    lines = tests_text.split("\n")
    try:
        exec(compile(tests_text, "tests.py", "exec"), names)
    except BaseException as error:  # whatever the tests do
        return {"kind": "tests", "message": _what(error, lines), "runs": bench.last_runs()}
    tests = [name for name, value in names.items() if name.startswith("test") and callable(value)]
    if not tests:
        return {"kind": "tests", "message": "there is no function whose name begins with test"}
    for name in tests:
        bench.runs = []
        message = ""
        try:
            names[name]()
        except BaseException as error:
            message = _what(error, lines)
        if message or bench.hung:
            kind = "hang" if bench.hung else "failed"
            message = message or "the program did not end in its time"
            return {"kind": kind, "test": name, "message": message, "runs": bench.last_runs()}
    return {"kind": "passed", "tests": len(tests), "runs": bench.last_runs()}


def _what(error: BaseException, lines: list[str]) -> str:
    """The line of the tests that failed, and the exception."""
    place, frame = "", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "tests.py":
            line = frame.tb_lineno
            place = f"tests.py, line {line}: {lines[line - 1].strip() if line <= len(lines) else ''}\n"
        frame = frame.tb_next
    try:
        text = str(error)
    except BaseException:
        text = "(its message cannot be printed)"
    return f"{place}{type(error).__name__}{': ' if text else ''}{text}"[:_MOST_MESSAGE]


def _hide() -> str:
    """Hide the tests from the program. Returns why that is not possible, or nothing."""
    try:
        os.unlink("job.json")
        os.unlink("tests.py")
        if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0:
            return ""
        return "The tests cannot be hidden from the program: prctl failed."
    except OSError as error:
        return f"The tests cannot be hidden from the program: {error}."


def main() -> None:
    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    with open("tests.py", encoding="utf-8", errors="surrogatepass", newline="") as file:
        tests_text = file.read()
    output = os.dup(1)
    fault = _hide()
    report = {"kind": "unavailable", "message": fault} if fault else _report(job, tests_text)
    line = f"\n{job['nonce']} {json.dumps(report, ensure_ascii=False)}\n".encode(errors="replace")
    while line:
        line = line[os.write(output, line) :]
    os._exit(report["kind"] != "passed")  # tests may have left threads behind


if __name__ == "__main__":
    main()
