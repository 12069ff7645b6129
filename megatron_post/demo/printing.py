"""Prints the demo's progress and results on a terminal."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_post.demo.evaluate import Response
from megatron_post.demo.task import Problem, check_answer
from megatron_post.display import printable
from megatron_post.rounds.accuracy import Accuracy

_SAMPLES = 4


class NumberedSteps:
    """Numbers the demo's steps, and prints how long each took. seconds: of all steps so far."""

    def __init__(self, console: Console) -> None:
        self._console, self.seconds = console, 0.0
        self._number = 0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print the title, run the body of this context, and print its time."""
        self._number += 1
        self._console.print(f"\n{self._number}. {title}", style="bold")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._console.print(f"({seconds:.1f} s)", style="dim", highlight=False)


def print_chat(messages: Sequence[dict[str, str]], console: Console) -> None:
    """Print the role and the content of each message, one message on a line."""
    for message in messages:
        _print_line(message["role"], message["content"], console)


def _print_line(label: str, text: str, console: Console, verdict: Text | None = None) -> None:
    line = Text.assemble((f"{label:>12}", "cyan"), f"  {printable(text)}")
    console.print(Text.assemble(line, "  ", verdict, "\n") if verdict else line, soft_wrap=True)


def print_samples(
    problems: Sequence[Problem], before: Sequence[Response], after: Sequence[Response], console: Console
) -> None:
    """Print a few problems with the answers before and after. One of them is still wrong, if there is one."""
    right = [check_answer(p, r.text) for p, r in zip(problems, after, strict=True)]
    wrong = [i for i, ok in enumerate(right) if not ok][:1]
    for i in [i for i, ok in enumerate(right) if ok][: _SAMPLES - len(wrong)] + wrong:
        verdict = Text("(right)", "green")
        if not right[i]:
            verdict = Text(f"(wrong, it is {problems[i].answer})", "red")
        print_chat(problems[i].messages, console)
        _print_line("before", _shortened(before[i].text), console)
        _print_line("after", after[i].text, console, verdict)


def _shortened(text: str) -> str:
    """The first characters of an untrained model's output, with control characters escaped."""
    return repr(text)[1:-1][:60] + "..."


def print_accuracies(
    trained: dict[str, Accuracy], rounds: Sequence[dict[str, Any]], console: Console
) -> None:
    """Print a table of exact match with 95% intervals.

    trained: accuracies by name. rounds: the `evaluation.json` of each round.
    """
    total = next(iter(trained.values())).total
    title = f"{total} held-out problems, exact match (95% interval)"
    table = Table(box=SIMPLE, pad_edge=False, title=title)
    table.add_column("", no_wrap=True)
    for name in ("greedy", "one sample", f"best of {rounds[0]['k']} by reward"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, accuracy in trained.items():
        table.add_row(name, str(accuracy))
    for number, found in enumerate(rounds, start=1):
        keys = ("greedy", "one_sample", "best_of_k")
        table.add_row(f"round {number}", *(str(Accuracy(**found[key])) for key in keys))
    console.print(table)
