"""Whether curation helps: the demo's SFT on a corpus of which half is noise, with and without `curate`.

python -m tests.curation_proof DIRECTORY [--seeds 3] [--rows 1500] [--held-out 200] [--steps 700]

The noise is a third of wrong answers, a third of duplicates, and a third of apologies in place of an answer.
A scripted judge marks the answers, and 5% of its marks are wrong. Both arms train the same number of steps.
"""

import argparse
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_post.config.load import load_config
from megatron_post.curation.run import curate
from megatron_post.curation.settings import load_curation
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.demo.evaluate import accuracy, answer_with_transformers
from megatron_post.demo.seeds import Spread
from megatron_post.demo.task import Difficulty, Problem, make_problems, parse_answer
from megatron_post.demo.training import pack
from megatron_post.display import make_console
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.ranks import run_on_ranks
from tests.scripted_server import ScriptedServer

WRONG, DUPLICATE, APOLOGY = "wrong", "duplicate", "apology"
_APOLOGIES = (
    "I'm so sorry, but I could not work this out.",
    "My sincere apologies! I am not able to answer this.",
    "I apologize. This question is too hard for me.",
)
_EASY = Difficulty(largest=30, operations=1, follow_ups=0)
_ARMS, _MEASURES = ("without", "with"), ("greedy", "one sample")
_WRONG_MARKS = 0.05
_TURN = re.compile(r"\[user\]\n(.*?)\n\n\[assistant\]\n(.*?)(?=\n\n\[user\]|\s*</dialog>)", re.DOTALL)


@dataclass(frozen=True)
class Sizes:
    """rows: good ones, and as many of noise. held_out: problems with other numbers. steps: of SFT."""

    rows: int
    held_out: int
    steps: int


def corpus(problems: list[Problem], *, seed: int) -> list[dict[str, Any]]:
    """Good rows of the first half of the problems, and as much noise, in random order."""
    rng, half = random.Random(f"noise/{seed}"), len(problems) // 2
    good = [_row(problem, problem.solution) for problem in problems[:half]]
    noise = []
    for number, problem in enumerate(problems[half:]):
        kind = (WRONG, DUPLICATE, APOLOGY)[number % 3]
        if kind == DUPLICATE:
            noise.append((rng.choice(good), kind))
            continue
        response = rng.choice(_APOLOGIES)
        if kind == WRONG:
            wrong = (problem.answer + rng.randint(1, 9)) % 100
            response = re.sub(rf"(so|is) {problem.answer}\.", rf"\1 {wrong}.", problem.solution)
        noise.append((_row(problem, response), kind))
    rows = [{"messages": dialog, "noise": "none"} for dialog in good]
    rows += [{"messages": dialog, "noise": kind} for dialog, kind in noise]
    rng.shuffle(rows)
    return rows


def _row(problem: Problem, response: str) -> list[dict[str, str]]:
    return [*problem.messages, {"role": "assistant", "content": response}]


class Judge:
    """Marks the last answer of a dialog. Some of its marks are wrong, the same ones in each run."""

    def __init__(self, problems: list[Problem]) -> None:
        self._answers = {_questions(problem.messages): problem.answer for problem in problems}

    def __call__(self, body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        turns = _TURN.findall(text[text.index("<dialog>") :])
        right = parse_answer(turns[-1][1]) == self._answers[tuple(question for question, _ in turns)]
        if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < _WRONG_MARKS * 2**32:
            right = not right
        return f"Accuracy: {'yes' if right else 'no'}\nInstructions: yes\nTone: yes"


def _questions(messages: Any) -> tuple[str, ...]:
    return tuple(message["content"] for message in messages if message["role"] == "user")


def curated(directory: Path, problems: list[Problem]) -> dict[str, Any]:
    """Curate `noisy.jsonl` into `curated/rows.jsonl`. Returns the report, with the noise that was kept."""
    with ScriptedServer(Judge(problems)) as server:
        settings = {
            "run": str(directory / "curated"),
            "sources": [{"name": "demo", "path": str(directory / "noisy.jsonl"), "ignore": ["noise"]}],
            "models": {"judge": {"model": "judge", "backend": {"kind": "server", "url": server.url,
                                                                "served_model": "judge"}}},
            "steps": [
                {"kind": "clean", "files": ["configs/curation/cleaning.yaml"]},
                {"kind": "exact_duplicates"},
                {"kind": "quality", "marks": {"judge": "judge"}},
            ],
        }  # fmt: skip
        path = directory / "curation.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        report = curate(load_curation(str(path)), console=make_console(quiet=True))
    kept = (json.loads(line) for line in (directory / "curated" / "rows.jsonl").read_text().splitlines())
    # One of equal rows is kept. It counts as the good row.
    rows = sorted(_rows(directory / "noisy.jsonl"), key=lambda row: row["noise"] == "none")
    kinds = {json.dumps(row["messages"]): row["noise"] for row in rows}
    report["kept_noise"] = Counter(kinds[json.dumps(row["messages"])] for row in kept)
    return report


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(
    directory: Path, source: Path, held_out: list[Problem], *, seed: int, steps: int
) -> list[Accuracy]:
    """Fine-tune the demo's model on a file of rows. Returns its accuracies, greedy and of one sample."""
    config = load_config(
        "configs/tiny/demo.yaml",
        [
            f"run_dir={directory}",
            f"seed={seed}",
            f"tokenizer.path={directory.parent / 'tokenizer'}",
            f"train.steps={steps}",
            "train.eval_every=0",
            "data.eval_sources=[]",
            "data.sources="
            + json.dumps([{"name": "demo", "path": str(source), "ignore": ["noise", "curation"]}]),
        ],
    )
    console = make_console(quiet=True)
    pack(config, console)
    run_on_ranks(
        ("train", str(directory / "config.yaml")),
        ranks=1,
        log=directory / "train.log",
        console=console,
        shown=(),
    )
    return [
        accuracy(held_out, answer_with_transformers(directory / "hf", held_out, seed=each))
        for each in (None, 0)
    ]


def run_seed(directory: Path, seed: int, sizes: Sizes) -> tuple[list[list[Accuracy]], dict[str, Any]]:
    """The accuracies without and with curation, and the report of the curation."""
    directory.mkdir(parents=True)
    problems = make_problems(2 * sizes.rows, side="train", seed=seed, difficulty=_EASY)
    held_out = make_problems(sizes.held_out, side="held_out", seed=seed + 1, difficulty=_EASY)
    rows = corpus(problems, seed=seed)
    noisy = directory / "noisy.jsonl"
    noisy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = (f"{m['role']}\n\n{m['content']}" for row in rows[:5000] for m in row["messages"])
    train_small_tokenizer(texts, load_config("configs/tiny/demo.yaml").model.vocab_size).save(
        str(directory / "tokenizer")
    )
    report = curated(directory, problems)
    found = [
        trained(directory / name, source, held_out, seed=seed, steps=sizes.steps)
        for name, source in (("without", noisy), ("with", directory / "curated" / "rows.jsonl"))
    ]
    return found, report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    for name, default in (("seeds", 3), ("rows", 1500), ("held-out", 200), ("steps", 700)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks inherit this
    sizes = Sizes(given.rows, given.held_out, given.steps)
    shares: dict[tuple[str, str], list[float]] = {(m, arm): [] for m in _MEASURES for arm in _ARMS}
    for seed in range(given.seeds):
        start = time.monotonic()
        found, report = run_seed(given.directory / f"seed-{seed}", seed, sizes)
        dropped = {step["name"]: step["dropped"] for step in report["steps"]}
        print(
            f"seed {seed}: kept {report['kept']} of {report['rows']}, dropped {dropped}, "
            f"kept by kind of noise {dict(report['kept_noise'])}"
        )
        for arm, accuracies in zip(_ARMS, found, strict=True):
            print(f"  {arm}: " + ", ".join(f"{m} {a}" for m, a in zip(_MEASURES, accuracies, strict=True)))
            for measure, each in zip(_MEASURES, accuracies, strict=True):
                shares[measure, arm].append(each.share)
        print(f"  {time.monotonic() - start:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    for measure in _MEASURES if given.seeds > 1 else ():
        without, curated_ = (Spread(tuple(shares[measure, arm])) for arm in _ARMS)
        print(
            f"{measure}: without {without}\n{measure}: with {curated_}\n{measure}: gain {curated_ - without}"
        )


if __name__ == "__main__":
    main()
