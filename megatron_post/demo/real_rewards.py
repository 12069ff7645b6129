"""Trains a tiny reward model on real preferences and measures its accuracy on held-out pairs.

    python -m megatron_post.demo.real_rewards --data data

data/gsm8k/example_model_solutions.jsonl is from github.com/openai/grade-school-math, and
data/hh_rlhf/harmless_base.jsonl.gz is harmless-base/train.jsonl.gz of the hub's Anthropic/hh-rlhf.

In GSM8K, `edited` is the ground truth, `chosen` is a model's correct solution and `rejected` is a wrong one.
HH-RLHF has chosen and rejected transcripts. A fifth of the problems (conversations) is held out.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
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

_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
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
    run_dir.mkdir(parents=True, exist_ok=True)
    order = permutation(len(rows), "held out", name).tolist()
    held_out = len(rows) // 5
    for side, numbers in (("held_out", order[:held_out]), ("train", order[held_out:])):
        lines = "".join(json.dumps(rows[n]) + "\n" for n in numbers)
        (run_dir / f"{side}.jsonl").write_text(lines)
    config = load_config("configs/tiny/reward.yaml", [f"run_dir={run_dir}"])
    build_store(config, console=console, overwrite=True)
    train(config)
    output = run_dir / "scores.jsonl"
    output.unlink(missing_ok=True)
    overrides = ["precision.dtype=fp32", "data.pack_length=4096", "data.max_bad_rows=20"]
    score_file(run_dir / "hf", run_dir / "held_out.jsonl", output, overrides)
    scored: list[dict[str, Any]] = [json.loads(line) for line in output.read_text().splitlines()]
    return _held_out_accuracy([row["scores"] for row in scored])


def main() -> None:
    """Train and score both datasets, and print the accuracies."""
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
    for name, rows in datasets.items():
        for pair, found in run(name, rows, run_dir=arguments.run_dir / name, console=console).items():
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
