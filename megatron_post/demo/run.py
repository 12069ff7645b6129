"""The demo, step by step: make a task, train a tiny Llama on it, align it, and see what it has learned."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_post.config.load import load_config
from megatron_post.config.schema import Config
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.demo.align import SAMPLES, metric_of_run, working_share, write_preferences
from megatron_post.demo.evaluate import accuracy, answer_with_transformers
from megatron_post.demo.ours import export_initial_weights, says_the_same
from megatron_post.demo.task import Problem, make_problems, write_dialogs, write_prompts
from megatron_post.demo.telling import Story, print_accuracies, print_chat, print_samples
from megatron_post.demo.training import pack, train
from megatron_post.rounds.accuracy import Accuracy

_MARKER = "made-by-megatron-post-demo"
_HELD_OUT_PREFERENCES = 0.1  # of the problems that are answered for preferences


def run_demo(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    train_problems: int,
    held_out_problems: int,
    preference_problems: int,
    console: Console,
) -> dict[str, Accuracy]:
    """Run the whole path in the config's `run_dir`, always afresh: an earlier demo there is replaced.

    The reward model's and DPO's configs stand beside the demo's, named `_reward` and `_dpo`. Returns the
    accuracy "before" training, after "sft" and after "dpo", and, as "same", how many responses ours and
    `transformers` share. Raises `ValueError` for a `run_dir` with other things in it, and where training
    fails.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the demo is the CPU's, wherever it runs; ranks inherit it
    config = load_config(config_path, overrides)
    run_dir = Path(config.run_dir)
    _start_afresh(run_dir)
    story = Story(console)
    console.print("A Llama of 0.7 million parameters learns arithmetic on two cores, in a few minutes.")

    with story.step("Make arithmetic word problems"):
        # the recipe was tuned on the problems of the config's own seed
        held_out = make_problems(held_out_problems, side="held_out", seed=config.seed + 1)
        _make_data(config, train_problems, held_out)
        console.print(
            f"{train_problems:,} dialogs to train on and {held_out_problems:,} held out, with other numbers. "
            "Half of the answers show their working:"
        )
        print_chat(max(held_out[:20], key=lambda problem: problem.turns).dialog, console)

    with story.step("Render them in Llama 3's chat format and pack them"):
        pack(config, console)

    with story.step("Let the untrained model answer"):
        export_initial_weights(config, run_dir / "initial")
        before = answer_with_transformers(run_dir / "initial", held_out)
        console.print(f"{accuracy(held_out, before)} of the answers are right.")

    with story.step(f"Supervised fine-tuning with {config.parallel.model_size} ranks"):
        train(config, console)

    with story.step("Let it answer, by plain transformers"):
        tuned = answer_with_transformers(run_dir / "hf", held_out)
        print_samples(held_out, before, tuned, console)
        console.print(
            f"{accuracy(held_out, tuned)} are right; {working_share(tuned):.0%} show their working."
        )

    with story.step("Compare with our own model"):
        same = says_the_same(config, run_dir / "hf", tuned)
        console.print(f"{sum(same)} of {len(same)} responses are the same, token for token.")

    with story.step(f"Sample {SAMPLES} answers to each of {preference_problems} problems, and rank them"):
        problems = make_problems(preference_problems, side="train", seed=config.seed + 2)
        rows = write_preferences(
            run_dir / "hf",
            problems,
            run_dir / "preferences",
            held_out=_HELD_OUT_PREFERENCES,
            seed=config.seed,
        )
        console.print(f"{rows:,} preferences: right answers over wrong ones, worked ones over brief ones.")

    with story.step("Train a reward model on them"):
        reward = _stage_config(config_path, "reward", overrides, run_dir)
        pack(reward, console)
        train(reward, console)
        first, _ = metric_of_run(run_dir / "reward", "accuracy", kind="train")
        _, last = metric_of_run(run_dir / "reward", "accuracy", kind="eval")
        console.print(f"Pairs ranked right: {first:.0%} in its first steps, {last:.0%} of those held out.")

    with story.step("Direct preference optimisation, from the SFT model"):
        dpo = _stage_config(config_path, "dpo", overrides, run_dir)
        pack(dpo, console)
        train(dpo, console)
        first, last = metric_of_run(run_dir / "dpo", "margin", kind="train")
        console.print(f"Margin of better answers: {first:.2f} in its first steps, {last:.2f} in its last.")

    with story.step("Let the aligned model answer"):
        aligned = answer_with_transformers(run_dir / "dpo" / "hf", held_out)
        print_samples(held_out, tuned, aligned, console)
        console.print(
            f"{accuracy(held_out, aligned)} are right; {working_share(aligned):.0%} show their working."
        )

    results = {
        "before": accuracy(held_out, before),
        "sft": accuracy(held_out, tuned),
        "dpo": accuracy(held_out, aligned),
        "same": Accuracy(sum(same), len(same)),
    }
    print_accuracies(
        {"before training": results["before"], "after SFT": results["sft"], "after DPO": results["dpo"]},
        console,
    )
    console.print(
        f"{story.seconds:.0f} s in all. The model is in {run_dir / 'dpo' / 'hf'}, its reward model in "
        f"{run_dir / 'reward' / 'hf'}; any tool of the Llama world loads them."
    )
    numbers = {name: {"correct": value.correct, "total": value.total} for name, value in results.items()}
    (run_dir / "results.json").write_text(
        json.dumps({**numbers, "seconds": round(story.seconds, 1)}, indent=2) + "\n"
    )
    return results


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
    # what `round configs/tiny/round.yaml` goes on with
    run_dir = Path(config.run_dir)
    write_prompts(make_problems(1200, side="train", seed=config.seed + 3), run_dir / "prompts.jsonl")
    write_prompts(make_problems(150, side="train", seed=config.seed + 4), run_dir / "validation.jsonl")
    write_prompts(held_out, run_dir / "held_out_prompts.jsonl")
    texts = (f"{m['role']}\n\n{m['content']}" for problem in problems[:5000] for m in problem.dialog)
    train_small_tokenizer(texts, config.model.vocab_size).save(config.tokenizer.path)


def _stage_config(config_path: str, stage: str, overrides: Sequence[str], run_dir: Path) -> Config:
    """The config of a later stage. Of the demo's overrides, those of the model and of the lengths hold."""
    path = Path(config_path)
    shared = [text for text in overrides if text.startswith(("model.", "train.", "data.pack_length"))]
    return load_config(
        path.with_name(f"{path.stem}_{stage}{path.suffix}"), [*shared, f"run_dir={run_dir / stage}"]
    )
