"""A reward model of steps from rows to exports, on real ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_post.config.schema import Config
from megatron_post.convert.hf_reader import open_weights
from megatron_post.data.build import build_store
from megatron_post.data.tokenizer import load_tokenizer, train_small_tokenizer
from megatron_post.rounds.merge import merge
from megatron_post.rounds.merge_settings import MethodMerge
from megatron_post.rounds.score import score_file
from megatron_post.storage import manifest
from megatron_post.train.run import train
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from tests.unit.rounds.models import tiny_policy

transformers = pytest.importorskip("transformers")
FP32 = ("precision.dtype=fp32", "data.pack_length=512")


def _config(directory: Path, name: str = "run", **sections: Any) -> Config:
    """A run on 96 sums in three steps, some of which have a wrong step."""
    rows = []
    for i in range(96):
        right = [i % 4 != 1, i % 4 != 1, i % 4 == 0]
        steps = [f"{i} plus 1 is {i + 1}." if right[0] else "I guess?", "Yes." if right[1] else "No?"]
        steps.append(f"It is {i + 1}." if right[2] else "Who knows?")
        rows.append({"prompt": f"What is {i} plus 1?", "completions": steps, "labels": right})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in rows for text in (row["prompt"], *row["completions"])]
    train_small_tokenizer(texts, 300).save(directory / "tokenizer")
    values: dict[str, Any] = {
        "model": {"vocab_size": 512},
        "tokenizer": {"path": str(directory / "tokenizer")},
        "data": {
            "store": str(directory / "store"),
            "sources": [{"name": "sums", "path": str(directory / "steps.jsonl")}],
            "pack_length": 256,
        },
        "train": {"steps": 12, "global_batch": 4, "export_hf": True},
        "optimizer": {"lr": 2e-3},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return tiny_config(directory / name, stage="step_reward", **values)


def _scores(file: Path) -> list[list[float]]:
    return [line["steps"][0] for line in map(json.loads, file.read_text().splitlines())]


def test_it_learns_exports_and_scores(tmp_path: Path) -> None:
    """It trains under TP 2 x CP 2 with SP. Its export has the same step scores in `transformers`."""
    config = _config(tmp_path, parallel={"tensor": 2, "context": 2, "sequence": True}, train={"steps": 14})
    build_store(config, console=Console(quiet=True))
    run_ranks(train, 4, config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0.5 < lines[0]["loss"] < 0.9
    assert lines[-1]["loss"] < 0.3 and lines[-1]["accuracy_wrong"] > 0.8
    export, rows, output = tmp_path / "run/hf", tmp_path / "steps.jsonl", tmp_path / "scores.jsonl"
    assert [each.written for each in run_ranks(score_file, 1, export, rows, output, FP32)] == [96]
    model = transformers.AutoModelForTokenClassification.from_pretrained(export)
    assert type(model) is transformers.LlamaForTokenClassification and float(model.score.bias) != 0
    expected = [_by_transformers(model, export, json.loads(row)) for row in rows.read_text().splitlines()[:8]]
    for line, probabilities in zip(output.read_text().splitlines(), expected, strict=False):
        found = json.loads(line)
        np.testing.assert_allclose(found["steps"], [probabilities], atol=1e-4)
        assert found["min"] == [min(found["steps"][0])] and found["last"] == [found["steps"][0][-1]]
        assert found["product"] == [pytest.approx(np.prod(found["steps"][0]), rel=1e-12)]
    # The file ends in the middle of a line, as after a crash. Another layout scores the rest.
    whole, content = _scores(output), output.read_bytes()
    output.write_bytes(content[: len(content) // 2])
    layout = ("parallel.context=2", "parallel.pipeline=2")
    run_ranks(score_file, 8, export, rows, output, (*FP32, *layout))  # and DP 2
    np.testing.assert_allclose(_scores(output), whole, atol=1e-4)


def _by_transformers(model: Any, export: Path, row: dict[str, Any]) -> list[float]:
    """The probability of each step. Its tokens are encoded one step after another."""
    tokenizer = load_tokenizer(export)
    hugging_face = transformers.AutoTokenizer.from_pretrained(export)
    ids = hugging_face.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    *steps, last = row["completions"]
    places = []
    for text in (*(f"{step}\n\n" for step in steps), last):
        ids = [*ids, *tokenizer.encode(text)]
        places.append(len(ids) - 1)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, places, 0]
    return torch.sigmoid(logits).tolist()


def test_responses_without_steps_are_split(tmp_path: Path) -> None:
    """Samples have texts. Numbered steps are used if there are any, and else the separator splits."""
    model = tiny_policy(tmp_path / "model", scalar_head=True, scores_steps=True)
    texts = ["Step 1: a\n\nb\nStep 2: c", "a\n\nb\n\nc", "a\nb"]
    rows = [{"prompt": "1 2 3", "completion": text} for text in texts]
    rows.append({"prompt": "1", "completions": ["a\n\nb", "c"], "labels": [True, None]})
    rows.append({"prompt": "1", "chosen": "a\n\nb", "rejected": "c"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ranks(score_file, 1, model, tmp_path / "rows.jsonl", tmp_path / "scores.jsonl", FP32)
    found = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [[len(steps) for steps in line["steps"]] for line in found] == [[2], [3], [1], [2], [2, 1]]
    with pytest.raises(ValueError, match=r"holds 5 lines with steps of another data.steps.separator"):
        _score_here(model, tmp_path, "data.steps.separator=\n")


def _score_here(model: Path, directory: Path, override: str) -> None:
    (error,) = run_ranks(_error_of_score, 1, model, directory, override)
    if error:
        raise ValueError(error)


def _error_of_score(model: Path, directory: Path, override: str) -> str:
    try:
        score_file(model, directory / "rows.jsonl", directory / "scores.jsonl", (*FP32, override))
    except ValueError as error:
        return str(error)
    return ""


def test_resume_is_bit_exact_and_layouts_agree(tmp_path: Path) -> None:
    """A run that goes on from step 6 ends with the same bytes, and in another layout with equal values."""
    config = _config(tmp_path, train={"steps": 12}, checkpoint={"every": 6, "keep": 9})
    build_store(config, console=Console(quiet=True))
    run_ranks(train, 1, config)
    step = manifest.step_directory(tmp_path / "run/checkpoints", 6)
    expected = load_file(tmp_path / "run/hf/model.safetensors")
    for name, ranks, layout in (
        ("same", 1, {}),
        ("resharded", 4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    ):
        shutil.copytree(step, tmp_path / name / "checkpoints" / step.name)
        run_ranks(train, ranks, _config(tmp_path, name, parallel=layout, checkpoint={"every": 6, "keep": 9}))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["step"] == 7
        files = (tmp_path / name / "hf").glob("*.safetensors")
        found = {key: value for file in files for key, value in load_file(file).items()}
        assert found.keys() == expected.keys() and "score.bias" in found
        for key, value in expected.items():
            if name == "same":
                assert torch.equal(found[key], value), key
            else:
                # Adam divides by the root of its second moment, which enlarges the rounding of fp32.
                np.testing.assert_allclose(found[key], value, atol=2e-4)


def test_what_it_may_start_from(tmp_path: Path) -> None:
    """A language model gets a new head, and a reward model of responses gets a bias of 0.

    A reward model of responses cannot start from one of steps, and the two cannot be averaged.
    """
    config = _config(tmp_path, train={"steps": 1}, optimizer={"lr": 1e-30}, model={"vocab_size": 512})
    build_store(config, console=Console(quiet=True))
    run_ranks(train, 1, config)
    exported = tmp_path / "run/hf"
    weights = load_file(exported / "model.safetensors")
    assert abs(float(weights["score.bias"])) < 1e-29  # one step of the learning rate
    again = config.model_copy(
        update={
            "run_dir": str(tmp_path / "again"),
            "model": config.model.model_copy(update={"init_from": str(exported)}),
        }
    )
    run_ranks(train, 1, again)
    after = load_file(tmp_path / "again/hf/model.safetensors")
    assert abs(float(after["score.bias"]) - float(weights.pop("score.bias"))) < 1e-29
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match=r"is a reward model of steps: it has score.bias, and only"):
        open_weights(again.model, seed=1, scalar_head=True)
    models = {
        name: tiny_policy(tmp_path / name, scalar_head=True, scores_steps=name == "steps")
        for name in ("steps", "responses")
    }
    plan = MethodMerge(models=[{"model": str(path)} for path in models.values()], method="linear")
    with pytest.raises(ValueError, match="one reward model scores steps, the other whole responses"):
        merge(plan, tmp_path / "merged", report=print)
