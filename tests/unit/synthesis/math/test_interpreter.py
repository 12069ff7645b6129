"""Sessions of Python in the sandbox: state stays, earlier output is hidden, and what ends them is seen."""

import asyncio

import pytest

from megatron_post.sandbox.outcome import Outcome
from megatron_post.sandbox.sandbox import open_sandbox
from megatron_post.sandbox.settings import Bubblewrap, Limits
from megatron_post.synthesis.math.interpreter import has_ended, reached_limit, session, shown

LIMITS = Limits(seconds=20, cpu_seconds=1, output_kib=8)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, ...], Outcome]:
    async def run() -> dict[tuple[str, ...], Outcome]:
        with open_sandbox(Bubblewrap(limits=LIMITS)) as sandbox:
            found = {}
            for blocks in SHOWN:
                files, command = session(blocks)
                content = {n: f if isinstance(f, str | bytes) else f.read_text() for n, f in files.items()}
                found[blocks] = await sandbox.run(content, command)
            return found

    return asyncio.run(run())


SHOWN = {
    ("print(1)", "2"): "completed\n[stdout]\n2\n[/stdout]",
    ("x = 1\nprint('hidden')", "print(x)\nx + 1"): "completed\n[stdout]\n1\n2\n[/stdout]",
    ("import os; os.system('echo hidden; echo hidden >&2')", "x = 1"): "completed",
    ("x = 3\n1 / 0", "x"): "completed\n[stdout]\n3\n[/stdout]",  # as far as the block ran
    ("import sys; sys.stdout = None", "print(4)"): "completed\n[stdout]\n4\n[/stdout]",
    ("raise SystemExit", "5"): "completed\n[stdout]\n5\n[/stdout]",
    ("def f(x):\n    return 1 / x", "print('begin')\nf(0)"): (
        "error\n[stdout]\nbegin\n[/stdout]\n[stderr]\nTraceback (most recent call last):\n"
        '  File "block_2.py", line 2, in <module>\n    f(0)\n'
        '  File "block_1.py", line 2, in f\n    return 1 / x\n'
        "ZeroDivisionError: division by zero\n[/stderr]"
    ),
    ("x = = 1",): (
        'error\n[stderr]\n  File "block_1.py", line 1\n    x = = 1\nSyntaxError: invalid syntax\n[/stderr]'
    ),
    ("print('a' * 50)",): f"completed\n[stdout]\n{'a' * 40}\n[10 more characters]\n[/stdout]",
    ("while True: pass",): "timeout",
    ("",): "completed",
    ("import random; a = random.random()", "random.seed(0); a == random.random()"): (
        "completed\n[stdout]\nTrue\n[/stdout]"
    ),
}


@pytest.mark.parametrize("blocks", SHOWN)
def test_what_a_model_gets_to_see(outcomes: dict[tuple[str, ...], Outcome], blocks: tuple[str, ...]) -> None:
    outcome = outcomes[blocks]
    most = 40 if "a' * 50" in blocks[0] else 2000
    lines = shown(outcome, most=most).splitlines()
    # where Python marks a part of a line depends on its version
    assert [line for line in lines if line.strip("~^ ")] == SHOWN[blocks].splitlines()
    assert not has_ended(outcome)
    assert reached_limit(outcome) == (SHOWN[blocks] == "timeout")


@pytest.mark.parametrize(
    "stderr", ["", "no mark", "\n(end of session)\nand more"], ids=["nothing", "text", "more"]
)
def test_without_its_last_line_a_session_has_ended(stderr: str) -> None:
    assert has_ended(Outcome("passed", 0, "7", stderr, 0.1))
    assert not has_ended(Outcome("timeout", 137, "7", stderr, 0.1))
