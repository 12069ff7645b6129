"""Tests of a round's steps, of failed prompts, and of the files that a repeated step removes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megatron_post.config.load import ConfigError
from megatron_post.inference.failures import read_failures, write_failures
from megatron_post.inference.generate import Generate
from megatron_post.rounds import round_actions
from megatron_post.rounds.round import Round
from megatron_post.rounds.run import _undo
from megatron_post.rounds.settings import load_round
from megatron_post.rounds.state import State
from megatron_post.rounds.steps import RoundStep, all_steps
from megatron_post.rounds.verifier import ExactMatch
from megatron_post.storage.files import read_lines, write_json, write_lines

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_what_the_shipped_rounds_ask_of_score(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`score` gets the layout of the reward model, but no interleaved schedule, which it does not support."""
    monkeypatch.chdir(CONFIGS.parent)
    settings = load_round(CONFIGS / f"llama3_{size}" / "round.yaml")
    commands = {step.name: step.command for step in all_steps(settings, Console(quiet=True))}
    for name in ("round-01/score", "round-01/score-held-out"):
        assert any(word.startswith("parallel.tensor=") for word in commands[name]) or size == "8b"
        assert not any(word.startswith("parallel.virtual_pipeline") for word in commands[name])
    assert "parallel.virtual_pipeline=5" in commands["round-01/reference"] or size != "70b"


REWARDS = [
    {"name": "helpful", "models": ["trained", "models/other"], "combine": "min"},
    {"name": "steps", "models": ["models/prm"], "of_steps": "min", "separator": "\n", "weight": {"math": 1}},
]


def test_a_list_of_rewards_scores_with_each_model(tmp_path: Path) -> None:
    """Each model has a step and a file of its own. `select` gets all files by the names in the list."""
    values = [f"run_dir={tmp_path}", f"reward={json.dumps(REWARDS)}"]
    settings = load_round(CONFIGS / "tiny" / "round.yaml", values)
    steps = {step.name: step for step in all_steps(settings, Console(quiet=True))}
    scoring = [name for name in steps if "/score" in name]
    assert scoring == [f"round-01/{name}-{n}" for name in ("score", "score-held-out") for n in range(1, 4)]
    trained = str(tmp_path / "round-01" / "reward" / "hf")
    models = [steps[f"round-01/score-{number}"].command[1] for number in (1, 2, 3)]
    assert models == [trained, "models/other", "models/prm"]
    assert 'data.steps.separator="\\n"' in steps["round-01/score-3"].command
    assert "round-01/reward-train" in steps
    samples = Round(settings, 1, Console(quiet=True)).samples("samples.jsonl", "scores.jsonl")
    directory = tmp_path / "round-01"
    assert samples.scores == {
        name: str(directory / f"scores-{number}.jsonl")
        for number, name in enumerate(("trained", "models/other", "models/prm"), start=1)
    }


def test_a_list_without_the_rounds_own_reward_model(tmp_path: Path) -> None:
    """No reward model is trained then, and preferences for it are not needed."""
    values = [f"run_dir={tmp_path}", f"reward={json.dumps(REWARDS[1:])}", "generate.collected_samples=4"]
    settings = load_round(CONFIGS / "tiny" / "round.yaml", values)
    names = [step.name for step in all_steps(settings, Console(quiet=True))]
    assert not [name for name in names if "reward" in name or "collect" in name]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([f"reward={json.dumps(REWARDS)}", "start.reward=r"], "start.reward has no effect with a list"),
        (["reward=[{name: a, models: [trained], of_steps: min}]"], "'a': the round trains a reward model of"),
        (["reward=[{name: a, models: [x]}, {name: a, models: [y]}]"], "'a' is there twice"),
        (["reward=[{name: a, models: [x]}]"], "generate.collected_samples has no effect, because no entry"),
    ],
)
def test_wrong_lists_of_rewards(values: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_round(CONFIGS / "tiny" / "round.yaml", values)


def test_what_failed_is_not_right(tmp_path: Path) -> None:
    """One of two held-out prompts failed. So greedy has 1 of 2, one sample 1 of 4, best of K 1 of 2."""
    prompts = [{"prompt": f"{i}?", "answer": str(i)} for i in (1, 2)]
    write_lines(tmp_path / "prompts.jsonl", prompts)
    verifier = ExactMatch(kind="exact", pattern=r"is (\d+)")
    settings: Any = SimpleNamespace(
        run_dir=str(tmp_path),
        select=SimpleNamespace(verifier=verifier, tie=0.0),
        data=SimpleNamespace(held_out=str(tmp_path / "prompts.jsonl"), max_bad_rows=0),
        generate=SimpleNamespace(sampling=SimpleNamespace(samples=2)),
        reward=(),
        start=SimpleNamespace(reward=None),
    )
    r = Round(settings, 2, Console(quiet=True))
    write_json(r.directory / "choice.json", {"best": "p", "stage": "sft", "validation": {}})

    def drawn(name: str, *said: str) -> None:
        draws = [
            {"prompt": 1, "sample": k, "checkpoint": "p", "seed": k, "tokens": 1} for k in range(len(said))
        ]
        messages = [[{"role": "user", "content": "1?"}, {"role": "assistant", "content": t}] for t in said]
        rows = [d | {"finish": "stop", "messages": m} for d, m in zip(draws, messages, strict=True)]
        write_lines(r.directory / name, rows)
        write_failures(
            r.directory / name, [{"prompt": 2, "sample": k, "reason": "no"} for k in range(len(said))]
        )

    drawn("held_out.jsonl", "It is 1")
    drawn("held_out-samples.jsonl", "It is 1", "It is 7")
    scores = [{"row": row, "scores": [score]} for row, score in ((1, 2.0), (2, 1.0))]
    write_lines(r.directory / "held_out-scores.jsonl", scores)
    round_actions.evaluate(r)
    found = json.loads((r.directory / "evaluation.json").read_text())
    assert found["greedy"] == found["best_of_k"] == {"correct": 1, "total": 2}
    assert found["one_sample"] == {"correct": 1, "total": 4}


def test_a_rounds_samples_have_the_failures_of_both_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_round(
        CONFIGS / "tiny" / "round.yaml",
        [f"run_dir={tmp_path}", "data.prompts_per_round=null", "generate.previous_samples=1"],
    )
    first, second = (Round(settings, number, Console(quiet=True)) for number in (1, 2))
    write_json(first.directory / "choice.json", {"best": "better"})
    shares = []

    def drawn(settings: Generate, output: Path, **_: Any) -> None:
        shares.append(settings.max_failed)
        write_lines(output, [{"by": settings.model}])
        write_failures(output, [{"prompt": 1, "checkpoint": settings.model}])

    monkeypatch.setattr(round_actions, "generate", drawn)
    round_actions.generate_samples(second)
    assert [row["by"] for row in read_lines(second.directory / "samples.jsonl")] == ["better", first.policy]
    failures = read_failures(second.directory / "samples.jsonl")
    assert [row["checkpoint"] for row in failures] == ["better", first.policy]
    assert shares == [settings.generate.max_failed] * 2


def test_what_is_removed_before_a_step_is_done_anew(tmp_path: Path) -> None:
    """For a training step, all files except those of earlier steps are removed.

    A list of skipped packs would otherwise change the training. For other steps, the outputs and their
    unfinished files are removed.
    """
    run_dir, average = tmp_path / "sft", tmp_path / "average"
    for name in ("store", "checkpoints", "hf", ".partial-hf", "incarnations", "slurm", "watchdog"):
        (run_dir / name).mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "skipped.jsonl"):
        (run_dir / name).touch()
    for name in ("average", ".partial-average", ".converting-average", "dpo"):
        (tmp_path / name / "below").mkdir(parents=True)
    state = State(tmp_path / "run", {})
    for step in ("pack", "train", "average"):
        state.finish(step, 1.0)
    _undo([RoundStep("train", (run_dir,), run_dir=run_dir), RoundStep("average", (average,))], state)
    assert list(state.done) == ["pack"]
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "config.yaml",
        "incarnations",
        "slurm",
        "store",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "run", "sft"]
    write_lines(tmp_path / "samples", [])
    write_failures(tmp_path / "samples", [{"prompt": 1}])
    _undo([RoundStep("generate", (tmp_path / "samples",))], state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "run", "sft"]
    # A step that has never begun.
    _undo([RoundStep("train", (tmp_path / "none",), run_dir=tmp_path / "none")], state)


CURATION = """
run: runs/curate
sources: [{name: chat, path: data/chat.jsonl}]
steps: [{kind: exact_duplicates}]
"""


def test_a_curation_file_chooses_among_the_selected_rows(tmp_path: Path) -> None:
    """The step comes between `select` and the packing of SFT, which reads the rows that it keeps."""
    file = tmp_path / "curation.yaml"
    file.write_text(CURATION)
    settings = load_round(CONFIGS / "tiny" / "round.yaml", [f"run_dir={tmp_path}", f"curate={file}"])
    r = Round(settings, 1, Console(quiet=True))
    steps = [step.name.rpartition("/")[2] for step in all_steps(settings, Console(quiet=True))]
    at = steps.index("curate")
    assert (steps[at - 1], steps[at + 1]) == ("select", "sft-pack")
    answer = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    other = {"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]}
    rows = [{**row, "provenance": {"prompt": n}} for n, row in enumerate([answer, other, answer])]
    write_lines(tmp_path / "round-01" / "selection" / "sft.jsonl", rows)
    round_actions.curate_selected(r)
    kept = list(read_lines(r.sft_rows))
    assert [(row["messages"], row["provenance"]) for row in kept] == [
        (row["messages"], row["provenance"]) for row in rows[:2]
    ]
    assert (tmp_path / "round-01" / "curation" / "report.html").is_file()
    (source,) = r._sources("sft")
    assert source["path"] == str(r.sft_rows) and "curation" in source["ignore"]


def test_a_curation_file_of_other_sources_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "curation.yaml"
    file.write_text(CURATION.replace("exact_duplicates", "exact_duplicates, sources: [chat]"))
    settings = load_round(CONFIGS / "tiny" / "round.yaml", [f"run_dir={tmp_path}", f"curate={file}"])
    with pytest.raises(ConfigError, match="names the source 'chat', which is not in sources"):
        _ = Round(settings, 1, Console(quiet=True)).curation


def test_a_curation_that_keeps_nothing_ends_the_round(tmp_path: Path) -> None:
    file = tmp_path / "curation.yaml"
    file.write_text(CURATION.replace("exact_duplicates", "lengths, least_characters: 1000"))
    settings = load_round(CONFIGS / "tiny" / "round.yaml", [f"run_dir={tmp_path}", f"curate={file}"])
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    write_lines(tmp_path / "round-01" / "selection" / "sft.jsonl", rows)
    with pytest.raises(ValueError, match="keeps none of the selected rows"):
        round_actions.curate_selected(Round(settings, 1, Console(quiet=True)))
