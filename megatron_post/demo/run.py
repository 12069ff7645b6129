"""The demo, told step by step: make a task, train a tiny Llama on it, and see what it has learned."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_post.config.load import load_config, to_yaml
from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.demo.evaluate import Accuracy, Response, accuracy, answer_with_transformers
from megatron_post.demo.ours import export_initial_weights, says_the_same
from megatron_post.demo.task import Problem, check_answer, make_problems, write_dialogs

_MARKER = "made-by-megatron-post-demo"
_SAMPLES = 4
_LOG_TAIL = 30


def run_demo(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    train_problems: int,
    held_out_problems: int,
    console: Console,
) -> dict[str, Accuracy]:
    """Run the whole path in the config's `run_dir`, always afresh: an earlier demo there is replaced.

    Returns the accuracy "before" and "after" training and, as "same", how many responses ours and
    `transformers` share. Raises `ValueError` for a `run_dir` with other things in it, and where training
    fails.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the demo is the CPU's, wherever it runs; ranks inherit it
    config = load_config(config_path, overrides)
    run_dir = Path(config.run_dir)
    _start_afresh(run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    story = _Story(console)
    console.print("A Llama of 0.7 million parameters learns arithmetic on two cores, in a few minutes.")

    with story.step("Make arithmetic word problems"):
        # the recipe was tuned on the problems of the config's own seed
        held_out = make_problems(held_out_problems, side="held_out", seed=config.seed + 1)
        _make_data(config, train_problems, held_out)
        console.print(
            f"{train_problems:,} dialogs to train on and {held_out_problems:,} held out, with other numbers:"
        )
        _print_chat(max(held_out[:20], key=lambda problem: problem.turns).dialog, console)

    with story.step("Render them in Llama 3's chat format and pack them"):
        _quietly_pack(config, console)

    with story.step("Let the untrained model answer"):
        export_initial_weights(config, run_dir / "initial")
        before = answer_with_transformers(run_dir / "initial", held_out)
        console.print(f"{accuracy(held_out, before)} of the answers are right.")

    with story.step(f"Train with {config.parallel.model_size} ranks"):
        _train(run_dir, console, ranks=config.parallel.model_size)

    with story.step("Let the trained model answer, by plain transformers"):
        after = answer_with_transformers(run_dir / "hf", held_out)
        _print_samples(held_out, before, after, console)

    with story.step("Compare with our own model"):
        same = says_the_same(config, run_dir / "hf", after)
        console.print(f"{sum(same)} of {len(same)} responses are the same, token for token.")

    results = {
        "before": accuracy(held_out, before),
        "after": accuracy(held_out, after),
        "same": Accuracy(sum(same), len(same)),
    }
    _finish(results, run_dir, story.seconds, console)
    return results


class _Story:
    """Numbers the steps, and says how long each took."""

    def __init__(self, console: Console) -> None:
        self._console, self.seconds = console, 0.0
        self._number = 0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._number += 1
        self._console.print(f"\n[bold]{self._number}. {title}[/bold]")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self._console.print(f"[dim]({seconds:.1f} s)[/dim]", highlight=False)


def _start_afresh(run_dir: Path) -> None:
    marker = run_dir / _MARKER
    if run_dir.exists() and any(run_dir.iterdir()) and not marker.is_file():
        raise ValueError(f"{run_dir} holds something else than an earlier demo; choose another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    marker.touch()


def _make_data(config: Config, train_problems: int, held_out: Sequence[Problem]) -> None:
    problems = make_problems(train_problems, side="train", seed=config.seed)
    (source,), (held_out_source,) = config.data.sources, config.data.eval_sources
    write_dialogs(problems, Path(source.path))
    write_dialogs(held_out, Path(held_out_source.path))
    texts = (f"{m['role']}\n\n{m['content']}" for problem in problems[:5000] for m in problem.dialog)
    train_small_tokenizer(texts, config.model.vocab_size).save(config.tokenizer.path)


def _quietly_pack(config: Config, console: Console) -> None:
    summaries = build_store(config, console=Console(quiet=True))
    for group, summary in summaries.items():
        packs = f"{summary.num_packs:,} packs of {config.data.pack_length:,}"
        console.print(f"{group}: {summary.tokens:,} tokens in {packs}")


def _train(run_dir: Path, console: Console, *, ranks: int) -> None:
    """Train under torchrun. Progress is shown, everything else that the ranks say is in `train.log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_post", "train", str(run_dir / "config.yaml")]
    console.print(
        f"torchrun --nproc-per-node {ranks} -m megatron_post train {run_dir / 'config.yaml'}", style="dim"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = run_dir / "train.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(("step ", str(run_dir))):
                console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-_LOG_TAIL:])
        raise ValueError(f"training ended with status {process.returncode}; the end of {log}:\n{tail}")


def _print_chat(messages: Sequence[dict[str, str]], console: Console) -> None:
    for message in messages:
        _print_line(message["role"], message["content"], console)


def _print_line(label: str, text: str, console: Console, verdict: str = "") -> None:
    """verdict: markup; the text is printed as it is."""
    console.print(f"[cyan]{label:>12}[/cyan]  {escape(text)}{verdict}", highlight=False, soft_wrap=True)


def _print_samples(
    problems: Sequence[Problem], before: Sequence[Response], after: Sequence[Response], console: Console
) -> None:
    """A few problems with both answers; one that is still wrong among them, if there is one."""
    right = [check_answer(p, r.text) for p, r in zip(problems, after, strict=True)]
    wrong = [i for i, ok in enumerate(right) if not ok][:1]
    for i in [i for i, ok in enumerate(right) if ok][: _SAMPLES - len(wrong)] + wrong:
        verdict = "[green]right[/green]" if right[i] else f"[red]wrong, it is {problems[i].answer}[/red]"
        _print_chat(problems[i].messages, console)
        _print_line("before", _shortened(before[i].text), console)
        _print_line("after", after[i].text, console, f"  ({verdict})\n")


def _shortened(text: str) -> str:
    """The first characters of an untrained model's noise, control characters spelt out."""
    return repr(text)[1:-1][:60] + "..."


def _finish(results: dict[str, Accuracy], run_dir: Path, seconds: float, console: Console) -> None:
    table = Table(box=SIMPLE, title=f"{results['after'].total} held-out problems, exact match")
    table.add_column("")
    table.add_column("accuracy, 95% interval", justify="right")
    table.add_row("before training", str(results["before"]))
    table.add_row("after training", str(results["after"]))
    table.add_row("ours = transformers", f"{results['same'].correct} of {results['same'].total}")
    console.print(table)
    console.print(
        f"{seconds:.0f} s in all. The model is in {run_dir / 'hf'}; any tool of the Llama world loads it."
    )
    numbers = {name: {"correct": value.correct, "total": value.total} for name, value in results.items()}
    (run_dir / "results.json").write_text(
        json.dumps({**numbers, "seconds": round(seconds, 1)}, indent=2) + "\n"
    )
