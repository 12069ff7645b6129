"""What tests report of programs, and what programs and tests cannot do to each other."""

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.sandbox import Sandbox, open_sandbox
from megatron_post.sandbox.settings import Bubblewrap, Limits
from megatron_post.synthesis.code.mutants import survivors
from megatron_post.synthesis.code.unit_tests import Bench, Report
from megatron_post.synthesis.task import Files
from tests.unit.synthesis.code.running import needs_bubblewrap

pytestmark = needs_bubblewrap
NONCE = "0f" * 16
ECHO = "import sys\nprint(sys.stdin.read(), *sys.argv[1:])\n"


class SandboxTask:
    """As much of a task as a bench needs."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def run(self, step: str, files: Files, command: Sequence[str]) -> Outcome:
        content = {name: text.read_text() if isinstance(text, Path) else text for name, text in files.items()}
        return await self._sandbox.run(content, command)

    async def together(self, *work: Awaitable[Any]) -> list[Any]:
        return [await each for each in work]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    limits = Limits(seconds=20.0, disk_mib=16, memory_mib=128)
    with open_sandbox(Bubblewrap(programs=1, limits=limits)) as sandbox:
        task: Any = SandboxTask(sandbox)
        yield Bench(task, "python", NONCE, 2.0)


def _run(bench: Bench, source: str, *lines: str) -> Report:
    """Run one test that has these lines."""
    tests = "def test_it():\n" + "".join(f"    {line}\n" for line in lines)
    return asyncio.run(bench.run("test", source, tests))


def test_what_a_test_sees_of_a_run(bench: Bench) -> None:
    source = "import sys\nprint(sys.stdin.read() + sys.argv[2])\nsys.stderr.write('e')\nsys.exit(3)\n"
    report = _run(
        bench, source, "result = run('ä\\n', 'one', 'two words')",
        "assert (result.stdout, result.stderr, result.returncode) == ('ä\\ntwo words\\n', 'e', 3), result",
        "assert run().returncode == 1  # there is no second argument",
    )  # fmt: skip
    assert (report.kind, report.tests) == ("passed", 1)
    first, second = report.runs
    assert (first.stdin, first.arguments, first.stdout, first.stderr) == (
        "ä\n",
        "one two words",
        "ä\ntwo words\n",
        "e",
    )
    assert (first.returncode, second.returncode, first.printed, second.printed) == (3, 1, True, False)


def test_what_a_model_is_shown_of_a_failure(bench: Bench) -> None:
    report = _run(bench, ECHO, "run('1')", "assert run('2', 'x').stdout == '3', 'not three'")
    assert report.kind == "failed"
    assert report.text == (
        "Test test_it fails.\n"
        "tests.py, line 3: assert run('2', 'x').stdout == '3', 'not three'\nAssertionError: not three\n\n"
        "A run of the program ended with return code 0.\nstdin:\n1\nstdout:\n1\n\n\n"
        "A run of the program with the arguments 'x' ended with return code 0.\nstdin:\n2\nstdout:\n2 x"
    )


def test_outputs_are_equal_without_blanks_at_the_ends_of_lines(bench: Bench) -> None:
    report = _run(
        bench, ECHO, *(f"run({text!r})" for text in ("a\nb", "a  \nb\n\n", "a\n b", "a\n\nb", "ab"))
    )
    digests = [run.digest for run in report.runs]
    assert digests[0] == digests[1] and len(set(digests)) == 4


def test_all_bytes_of_an_output_are_compared(bench: Bench) -> None:
    source = (
        "import os, sys\nword = sys.argv[1]\n"
        "os.write(1, bytes([int(word)]) if len(word) == 3 else b'x\\n' * 700_000 + word.encode())\n"
    )
    report = _run(bench, source, *(f"run('', '{word}')" for word in ("254", "255", "1", "2")))
    assert len({run.digest for run in report.runs}) == 4


def test_tests_that_ask_for_any_output_are_not_good(bench: Bench) -> None:
    """A program that does nothing fails them, and no change of a program does."""
    source = "text = input()\nfor number in range(3):\n    print(number + 2 * len(text))\n"
    weak = "def test_it():\n    assert run('1 2').stdout.strip()\n"
    good = "def test_it():\n    assert run('1 2').stdout == '6\\n7\\n8\\n'\n"
    shares = [asyncio.run(survivors(bench, source, tests, 4))[1] for tests in (weak, good)]
    assert shares == [0.0, 1.0]


@pytest.mark.parametrize(
    ("source", "lines", "kind"),
    [
        pytest.param("while True:\n    pass\n", ["run()"], "hang", id="hangs"),
        pytest.param(
            "import time\ntime.sleep(60)\n",
            ["try:", "    run()", "except BaseException:", "    pass"],
            "hang",
            id="hangs, and the test hides it",
        ),
        pytest.param(
            "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n",
            ["run()"],
            "passed",
            id="leaves a child",
        ),
        pytest.param(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n",
            ["assert run().returncode == 0", "assert run().returncode == 0"],
            "passed",
            id="leaves a daemon",
        ),
        pytest.param("print('x' * 3_000_000)\n", ["run()"], "passed", id="prints much"),
        pytest.param("while True:\n    print('x' * 1000)\n", ["run()"], "disk", id="prints without end"),
        pytest.param(
            "import time\nx = b'x' * 200_000_000\ntime.sleep(60)\n",
            ["assert run().stdout"],
            "memory",
            id="takes memory",
        ),
        pytest.param("import os\nos.kill(-1, 9)\n", ["run()"], "killed", id="kills all"),
        pytest.param(
            # Programs that end at the kernel's limit could all be gone before the sandbox counts them.
            "import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n"
            "        time.sleep(60)\n",
            ["assert run().stdout"],
            "processes",
            id="forks without end",
        ),
        pytest.param(
            "for name in ('random', 'usercustomize', 'tests'):\n"
            "    for place in ('.', '..', '/tmp'):\n"
            "        open(f'{place}/{name}.py', 'w').write('import os; os._exit(0)')\n",
            ["run()", "import random", "assert run().stdout == str(random.random())"],
            "failed",
            id="plants modules that tests import",
        ),
        pytest.param(
            "import os, shutil\nshutil.rmtree('/tmp/work', ignore_errors=True)\n",
            ["run()", "assert run().stdout == 'x'"],
            "failed",
            id="removes all files",
        ),
        pytest.param(ECHO, ["import sys", "sys.exit(0)"], "failed", id="a test that exits"),
        pytest.param(ECHO, ["raise KeyboardInterrupt"], "failed", id="a test that is interrupted"),
        pytest.param(ECHO, ["import os", "os._exit(0)"], "no report", id="a test that ends everything"),
        pytest.param(ECHO, ["print('x' * 10 ** 7)"], "output", id="a test that prints much"),
        pytest.param(ECHO, ["import sys", "sys.stdout.close()", "sys.stderr.close()"], "passed", id="closes"),
        pytest.param(ECHO, ["return run(b'1')"], "failed", id="a test that gives bytes"),
        pytest.param(ECHO, ["for i in range(70):", "    run('\\0' * 5000)"], "passed", id="many runs"),
        pytest.param("\0", ["run()"], "build", id="a null character"),
        pytest.param("x = '\ud800'", ["run()"], "build", id="no text"),
    ],
)
def test_hostile_programs_and_tests(bench: Bench, source: str, lines: list[str], kind: str) -> None:
    assert _run(bench, source, *lines).kind == kind


@pytest.mark.parametrize(
    ("tests", "kind"),
    [
        ("", "tests"),
        ("def test_it(:\n", "tests"),
        ("def check():\n    assert run()\n", "tests"),
        ("test_data = [1]\n", "tests"),
        ("import numpy\n\ndef test_it():\n    assert run()\n", "tests"),
        ("(" * 5000, "tests"),
        ("def test_it(number):\n    assert run()\n", "failed"),
        ("def test_one():\n    run()\n\ndef test_two():\n    assert not run()\n", "failed"),
    ],
)
def test_tests_that_are_none(bench: Bench, tests: str, kind: str) -> None:
    report = asyncio.run(bench.run("test", ECHO, tests))
    assert report.kind == kind and report.message


def test_two_reports_are_none(bench: Bench) -> None:
    line = f"{NONCE} " + '{\\"kind\\": \\"passed\\"}'
    report = _run(bench, ECHO, "import os", f'os.write(1, "\\n{line}\\n".encode())')
    assert report.kind == "no report"
