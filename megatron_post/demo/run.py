"""Runs the demo: make a task, train a tiny Llama on it, align it, and measure what it has learned."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_post.config.load import load_config
from megatron_post.config.schema import Config
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.demo.evaluate import Response, accuracy, answer_with_transformers, working_share
from megatron_post.demo.in_process import export_initial_weights, responses_match
from megatron_post.demo.printing import NumberedSteps, print_accuracies, print_chat, print_samples
from megatron_post.demo.task import Problem, make_problems, write_dialogs, write_prompts
from megatron_post.demo.training import RANKS, pack, train
from megatron_post.rounds.accuracy import Accuracy
from megatron_post.rounds.run import run_rounds
from megatron_post.storage.files import write_json

ROUNDS, RESULTS = "rounds", "results.json"
_MARKER = "made-by-megatron-post-demo"


@dataclass(frozen=True)
class Sizes:
    """Numbers of problems to train on, to hold out, and to answer in each round, and the number of rounds."""

    train: int
    held_out: int
    round: int
    rounds: int


def run_demo(config_path: str, overrides: Sequence[str] = (), *, sizes: Sizes, console: Console) -> None:
    """Run the whole demo in the config's `run_dir`. An earlier demo there is deleted first.

    The file of the rounds is `round.yaml` in the config's directory. `results.json` has the accuracies
    "before" training, after "sft" and of each round. Its key "same" says how many responses of our model and
    of `transformers` are equal. Raises `ValueError` if `run_dir` holds anything else, and if training fails.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the demo always runs on the CPU; its ranks inherit this
    config = load_config(config_path, overrides)
    run_dir = Path(config.run_dir)
    _start_afresh(run_dir)
    steps = NumberedSteps(console)
    console.print("A Llama of 0.7 million parameters learns arithmetic on two cores, in a few minutes.")

    with steps.step("Make arithmetic word problems"):
        # The recipe was tuned on the problems of the config's own seed, so another seed measures it.
        held_out = make_problems(sizes.held_out, side="held_out", seed=config.seed + 1)
        _make_data(config, sizes, held_out)
        console.print(
            f"{sizes.train:,} dialogs to train on and {sizes.held_out:,} held out, with other numbers. "
            "Half of the answers show their working:"
        )
        print_chat(max(held_out[:20], key=lambda problem: problem.turns).dialog, console)

    before, tuned, same = _tune(config, held_out, steps, console)
    evaluations = _align(config, sizes, Path(config_path).with_name("round.yaml"), steps, console)
    best = evaluations[-1]["best"]
    with steps.step("Let the aligned model answer"):
        aligned = answer_with_transformers(Path(best), held_out)
        print_samples(held_out, tuned, aligned, console)
        _print_shares(held_out, aligned, console)

    results = {"untrained": accuracy(held_out, before), "after SFT": accuracy(held_out, tuned)}
    print_accuracies(results, evaluations, console)
    console.print(
        f"{steps.seconds:.0f} s in all. The model is in {best}, and any tool that loads Llama models can "
        f"load it. {_round_directory(run_dir, sizes.rounds) / 'report.html'} is the report.",
        soft_wrap=True,
    )
    summary = {
        "before": vars(results["untrained"]),
        "sft": vars(results["after SFT"]),
        "rounds": [{key: e[key] for key in ("greedy", "one_sample", "best_of_k", "k")} for e in evaluations],
        "same": vars(Accuracy(sum(same), len(same))),
        "seconds": round(steps.seconds, 1),
    }
    write_json(run_dir / RESULTS, summary)


def _tune(
    config: Config, held_out: Sequence[Problem], steps: NumberedSteps, console: Console
) -> tuple[list[Response], list[Response], list[bool]]:
    """Pack the data and fine-tune. Returns the answers before and after it.

    The last list says for each answer after it whether our own model gives the same tokens.
    """
    run_dir = Path(config.run_dir)
    with steps.step("Render them in Llama 3's chat format and pack them"):
        pack(config, console)

    with steps.step("Let the untrained model answer"):
        export_initial_weights(config, run_dir / "initial")
        before = answer_with_transformers(run_dir / "initial", held_out)
        console.print(f"{accuracy(held_out, before)} of the answers are right.")

    with steps.step(f"Supervised fine-tuning with {RANKS} ranks"):
        train(config, console)

    with steps.step("Let it answer, by plain transformers"):
        tuned = answer_with_transformers(run_dir / "hf", held_out)
        print_samples(held_out, before, tuned, console)
        _print_shares(held_out, tuned, console)

    with steps.step("Compare with our own model"):
        same = responses_match(config, run_dir / "hf", tuned)
        console.print(f"{sum(same)} of {len(same)} responses are the same, token for token.")
    return before, tuned, same


def _align(
    config: Config, sizes: Sizes, round_file: Path, steps: NumberedSteps, console: Console
) -> list[dict[str, Any]]:
    """Run the rounds. Returns the evaluation of each."""
    with steps.step(f"{_count(sizes.rounds, 'round')} of alignment"):
        console.print(
            "In each round, a reward model learns from preferences. The best model so far samples answers. "
            "The best answer to each problem is used for SFT, and the best and the worst for DPO. Both "
            "models are averaged. The best of the three models answers in the next round.",
            style="dim",
        )
        run_rounds(round_file, _round_overrides(config, sizes), console=console)
    directories = [_round_directory(Path(config.run_dir), n) for n in range(1, sizes.rounds + 1)]
    return [json.loads((path / "evaluation.json").read_text()) for path in directories]


def _round_directory(run_dir: Path, number: int) -> Path:
    return run_dir / ROUNDS / f"round-{number:02d}"


def _print_shares(held_out: Sequence[Problem], answers: Sequence[Response], console: Console) -> None:
    console.print(
        f"{accuracy(held_out, answers)} are right; {working_share(answers):.0%} show their working."
    )


def _start_afresh(run_dir: Path) -> None:
    marker = run_dir / _MARKER
    if run_dir.exists() and any(run_dir.iterdir()) and not marker.is_file():
        raise ValueError(
            f"{run_dir} holds other files than those of an earlier demo; choose another --run-dir"
        )
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    marker.touch()


def _make_data(config: Config, sizes: Sizes, held_out: Sequence[Problem]) -> None:
    problems = make_problems(sizes.train, side="train", seed=config.seed)
    (source,), (held_out_source,) = config.data.sources, config.data.eval_sources
    write_dialogs(problems, Path(source.path))
    write_dialogs(held_out, Path(held_out_source.path))
    # Problems that the rounds answer, and problems by which they choose among their models.
    run_dir = Path(config.run_dir)
    for name, count, seed in (
        ("prompts", sizes.round * sizes.rounds, config.seed + 3),
        ("validation", sizes.held_out, config.seed + 4),
    ):
        write_prompts(make_problems(count, side="train", seed=seed), run_dir / f"{name}.jsonl")
    write_prompts(held_out, run_dir / "held_out_prompts.jsonl")
    texts = (f"{m['role']}\n\n{m['content']}" for problem in problems[:5000] for m in problem.dialog)
    train_small_tokenizer(texts, config.model.vocab_size).save(config.tokenizer.path)


def _round_overrides(config: Config, sizes: Sizes) -> list[str]:
    run_dir = config.run_dir
    names = {"prompts": "prompts", "validation": "validation", "held_out": "held_out_prompts"}
    return [
        f"run_dir={run_dir}/{ROUNDS}",
        f"rounds={sizes.rounds}",
        f"seed={config.seed}",
        f"start.policy={run_dir}/hf",
        f"start.base={run_dir}/hf",
        f"data.prompts_per_round={sizes.round}",
        *(f"data.{key}={run_dir}/{name}.jsonl" for key, name in names.items()),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")
