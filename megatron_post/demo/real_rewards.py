"""Trains tiny reward models on real preferences and measures their accuracy on held-out pairs.

    python -m megatron_post.demo.real_rewards --data data

data/gsm8k/example_model_solutions.jsonl is from github.com/openai/grade-school-math, and
data/hh_rlhf/harmless_base.jsonl.gz is harmless-base/train.jsonl.gz of the hub's Anthropic/hh-rlhf.

In GSM8K, `edited` is the ground truth, `chosen` is a model's correct solution and `rejected` is a wrong one.
HH-RLHF has chosen and rejected transcripts. A fifth of the problems (conversations) is held out.

A reward model of steps is trained on the same GSM8K solutions, whose lines are steps. Their labels come from
the answers. All steps of a correct solution are right. Of a wrong solution only the last step is known to be
wrong, and the others have no label.
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_post.config.load import load_config
from megatron_post.data.build import build_store
from megatron_post.data.permutation import permutation
from megatron_post.display import make_console
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.score import score_file
from megatron_post.train.run import train
from megatron_post.train.signals import Requeue

_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
_SUMMARIES = ("min", "product", "last")
_PAIRS = {"edited > chosen": (0, 1), "chosen > rejected": (-2, -1), "edited > rejected": (0, -1)}


def _gsm8k_preferences(path: Path) -> Iterator[dict[str, str]]:
    """Rows of prompt, edited, chosen and rejected.

    A problem is left out unless it has both a correct and a wrong model solution.
    """
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        correct = [row[m]["solution"] for m in _MODELS if row[m]["is_correct"]]
        wrong = [row[m]["solution"] for m in _MODELS if not row[m]["is_correct"]]
        if correct and wrong:
            yield {
                "prompt": row["question"],
                "edited": row["ground_truth"],
                "chosen": correct[-1],
                "rejected": wrong[-1],
            }


def _hh_preferences(path: Path) -> Iterator[dict[str, str]]:
    """Rows of chosen and rejected transcripts."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _held_out_accuracy(scores: list[list[float]]) -> dict[str, Accuracy]:
    """Share of held-out pairs that a model ranks right, for each pair of ranks. A tie counts as wrong."""
    found = {}
    for name, (better, worse) in _PAIRS.items():
        triples = name != "chosen > rejected"
        pairs = [(row[better], row[worse]) for row in scores if len(row) == 3 or not triples]
        if pairs:
            found[name] = Accuracy(sum(a > b for a, b in pairs), len(pairs))
    return found


def run(name: str, rows: list[dict[str, str]], *, run_dir: Path, console: Console) -> dict[str, Accuracy]:
    """Split, pack, train and score one dataset."""
    held_out, trained = _split(name, rows)
    scored = _trained_and_scored(
        "configs/tiny/reward.yaml", trained, held_out, held_out, run_dir=run_dir, console=console
    )
    return _held_out_accuracy([row["scores"] for row in scored])


def run_steps(rows: list[dict[str, str]], *, run_dir: Path, console: Console) -> dict[str, Accuracy]:
    """The accuracies of a reward model of steps on the same held-out problems, for each summary of steps."""
    held_out, trained = _split("gsm8k", rows)
    scored = _trained_and_scored(
        "configs/tiny/step_reward.yaml",
        [labelled for row in trained for labelled in _labelled_steps(row)],
        [labelled for row in held_out for labelled in _labelled_steps(row)],
        held_out,
        run_dir=run_dir,
        console=console,
        overrides=("data.steps.separator=\n",),
    )
    return {
        f"{pair}, by {name}": found
        for name in _SUMMARIES
        for pair, found in _held_out_accuracy([row[name] for row in scored]).items()
    }


def _split(name: str, rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A fifth of the rows, which is held out, and the others."""
    order = permutation(len(rows), "held out", name).tolist()
    held_out = len(rows) // 5
    return [rows[n] for n in order[:held_out]], [rows[n] for n in order[held_out:]]


def _labelled_steps(row: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Each solution of a problem with the labels that its answer gives to its lines."""
    for name in ("edited", "chosen", "rejected"):
        steps = [line for line in row[name].splitlines() if line.strip()]
        labels: list[bool | None] = [True] * len(steps)
        if name == "rejected":
            labels = [*(None for _ in steps[1:]), False]
        yield {"prompt": row["prompt"], "completions": steps, "labels": labels}


def _trained_and_scored(
    config_file: str,
    trained: Sequence[dict[str, Any]],
    held_out: Sequence[dict[str, Any]],
    pairs: Sequence[dict[str, Any]],
    *,
    run_dir: Path,
    console: Console,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The lines of `score` about `pairs`, by a model that is trained on other rows."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for side, rows in (("train", trained), ("held_out", held_out), ("pairs", pairs)):
        (run_dir / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(config_file, [f"run_dir={run_dir}"])
    build_store(config, console=console, overwrite=True)
    if not train(config).is_finished:
        raise Requeue
    output = run_dir / "scores.jsonl"
    output.unlink(missing_ok=True)
    own = ["precision.dtype=fp32", "data.pack_length=4096", "data.max_bad_rows=20"]
    score_file(run_dir / "hf", run_dir / "pairs.jsonl", output, [*own, *overrides])
    return [json.loads(line) for line in output.read_text().splitlines()]


def main() -> None:
    """Train and score on both datasets, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/real_rewards"))
    arguments = parser.parse_args()
    console = make_console()
    datasets = {
        "gsm8k": list(_gsm8k_preferences(arguments.data / "gsm8k" / "example_model_solutions.jsonl")),
        "hh_rlhf": list(_hh_preferences(arguments.data / "hh_rlhf" / "harmless_base.jsonl.gz")),
    }
    table = Table(box=SIMPLE, title="held-out pairs ranked right")
    for heading in ("data", "pair", "pairs", "accuracy", "95% interval", "verdict"):
        table.add_column(heading)
    results = {
        name: run(name, rows, run_dir=arguments.run_dir / name, console=console)
        for name, rows in datasets.items()
    }
    steps = arguments.run_dir / "gsm8k_steps"
    results["gsm8k, steps"] = run_steps(datasets["gsm8k"], run_dir=steps, console=console)
    for name, accuracies in results.items():
        for pair, found in accuracies.items():
            low, high = found.interval
            verdict = "better than chance" if low > 0.5 else "not distinguishable from chance"
            table.add_row(
                name,
                pair,
                str(found.total),
                f"{found.correct / found.total:.1%}",
                f"{low:.1%} to {high:.1%}",
                verdict,
            )
    console.print(table)


if __name__ == "__main__":
    main()
