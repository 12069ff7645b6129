"""Reward model and DPO from rows to exports, on real ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_post.config.schema import Config
from megatron_post.data.build import build_store
from megatron_post.data.store import StoreError, open_store
from megatron_post.data.tokenizer import load_tokenizer, train_small_tokenizer
from megatron_post.rounds.reference import write_reference
from megatron_post.rounds.score import score_file
from megatron_post.train.run import train
from tests.ranks import run_ranks
from tests.tiny import tiny_config

transformers = pytest.importorskip("transformers")


def _rows(directory: Path) -> Path:
    """120 sums with a right answer and a wrong one. Every third also has an answer in better words."""
    rows = []
    for i in range(120):
        row: dict[str, Any] = {
            "prompt": f"What is {i} plus {i % 7}?",
            "chosen": f"It is {i + i % 7}.",
            "rejected": f"No idea, maybe {i + 3 + i % 5}?",
        }
        if i % 3 == 0:
            row["edited"] = f"{i} plus {i % 7} is {i + i % 7}."
        rows.append(row)
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [text for row in rows for text in row.values()]
    train_small_tokenizer(texts, 300).save(directory / "tokenizer")
    return directory / "pairs.jsonl"


def _config(directory: Path, stage: str, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"vocab_size": 512},
        "tokenizer": {"path": str(directory / "tokenizer")},
        "data": {
            "store": str(directory / f"store-{stage}"),
            "sources": [{"name": "sums", "path": str(directory / "pairs.jsonl")}],
            "pack_length": 256,
        },
        "train": {"steps": 12, "global_batch": 4, "export_hf": True},
        "optimizer": {"lr": 2e-3},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return tiny_config(directory / f"run-{stage}", stage=stage, **values)


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_reward_model_learns_exports_and_scores(tmp_path: Path) -> None:
    """A reward model trains with isolated rows under TP 2 x CP 2 with SP.

    Its export has the same scores in `transformers`, which pools the last token.
    """
    rows = _rows(tmp_path)
    layout = {"tensor": 2, "context": 2, "sequence": True}
    config = _config(tmp_path, "reward", parallel=layout)
    build_store(config, console=Console(quiet=True))
    run_ranks(train, 4, config)
    lines = _metrics(tmp_path / "run-reward")
    assert 0.4 < lines[0]["loss"] < 1.0
    assert lines[-1]["loss"] < 0.5 and lines[-1]["accuracy"] > 0.8
    export, output = tmp_path / "run-reward" / "hf", tmp_path / "scores.jsonl"
    single = ("precision.dtype=fp32", "data.pack_length=512")
    (scored,) = run_ranks(score_file, 1, export, rows, output, single)
    assert scored.written == 120
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = _scores_of_transformers(export, rows, limit=20)
    for line, scores in zip(found, expected, strict=False):
        np.testing.assert_allclose(line["scores"], scores, atol=1e-4)
    # The file ends in the middle of a line, as after a crash. The rest is scored again, in another layout, to
    # the same values.
    complete = output.read_bytes()
    output.write_bytes(complete[: len(complete) // 2])
    layout = ("parallel.context=2", "parallel.pipeline=2")
    run_ranks(score_file, 8, export, rows, output, (*single, *layout))  # and DP 2
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in again] == list(range(1, 121))
    np.testing.assert_allclose(
        [x for line in again for x in line["scores"]],
        [x for line in found for x in line["scores"]],
        atol=1e-4,
    )


def _scores_of_transformers(export: Path, rows: Path, *, limit: int) -> list[list[float]]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert isinstance(model, transformers.LlamaForSequenceClassification)
    result = []
    for line in rows.read_text().splitlines()[:limit]:
        row = json.loads(line)
        scores = []
        for name in ("edited", "chosen", "rejected"):
            if name in row:
                messages = [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row[name]},
                ]
                ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)[
                    "input_ids"
                ]
                with torch.no_grad():
                    scores.append(float(model(ids).logits[0, 0]))
        result.append(scores)
    return result


def test_a_reward_model_exports_the_same_bytes(tmp_path: Path) -> None:
    """Export, import and export give the same bytes, score included."""
    _rows(tmp_path)
    config = _config(tmp_path, "reward", train={"steps": 1})
    build_store(config, console=Console(quiet=True))
    run_ranks(train, 1, config)
    first = tmp_path / "run-reward" / "hf"
    again = config.model_copy(
        update={
            "run_dir": str(tmp_path / "again"),
            "model": config.model.model_copy(update={"init_from": str(first)}),
            "optimizer": config.optimizer.model_copy(update={"lr": 1e-30}),
        }
    )
    run_ranks(train, 1, again)
    before = load_file(first / "model.safetensors")
    after = load_file(tmp_path / "again" / "hf" / "model.safetensors")
    assert "score.weight" in before and "lm_head.weight" not in before
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def _initial_policy(directory: Path, config: Config) -> Path:
    """Write the weights to start from as a Hugging Face directory."""
    from safetensors.torch import save_file

    from megatron_post.convert.hf_config import to_hf_config
    from megatron_post.convert.hf_reader import RandomWeights
    from megatron_post.convert.mapping import hf_shapes

    target = directory / "policy"
    target.mkdir()
    weights = RandomWeights(config.model, seed=9)
    save_file({n: weights.read(n, None, 0, 0) for n in hf_shapes(config.model)}, target / "model.safetensors")
    values = to_hf_config(config.model, dtype="float32", bos_id=0, eos_ids=[1], pad_id=None)
    (target / "config.json").write_text(json.dumps(values))
    load_tokenizer(config.tokenizer.path).save(target)
    return target


def test_stored_and_frozen_reference_train_the_same(tmp_path: Path) -> None:
    """On one rank they are equal bit for bit, because both are the same forward pass.

    A reference that was computed under TP 2 x CP 2 differs only by rounding. A reference of other weights is
    refused.
    """
    _rows(tmp_path)
    plain = _config(tmp_path, "dpo")
    policy = _initial_policy(tmp_path, plain)
    config = _config(tmp_path, "dpo", model={"init_from": str(policy)}, parallel={"context": 2})
    build_store(config, console=Console(quiet=True))
    one_rank = _config(tmp_path, "dpo", model={"init_from": str(policy)})
    with pytest.raises(AssertionError, match="no reference log-probabilities; run `megatron-post reference"):
        run_ranks(train, 1, one_rank)
    fp32 = ("precision.dtype=fp32",)
    run_ranks(write_reference, 1, one_rank.data.store, policy, fp32)
    run_ranks(train, 1, one_rank)
    frozen = one_rank.model_copy(
        update={
            "run_dir": str(tmp_path / "frozen"),
            "dpo": one_rank.dpo.model_copy(update={"reference": "frozen"}),
        }
    )
    run_ranks(train, 1, frozen)
    stored_weights = load_file(tmp_path / "run-dpo" / "hf" / "model.safetensors")
    frozen_weights = load_file(tmp_path / "frozen" / "hf" / "model.safetensors")
    assert all(torch.equal(stored_weights[name], frozen_weights[name]) for name in stored_weights)
    lines = _metrics(tmp_path / "run-dpo")
    assert lines[0]["loss"] == pytest.approx(np.log(2) + 0.2 * lines[0]["nll"], abs=1e-6)
    assert lines[-1]["margin"] > lines[0]["margin"] + 0.05
    before = _reference(one_rank)
    layout = ("parallel.tensor=2", "parallel.context=2", "parallel.sequence=true")
    run_ranks(write_reference, 4, one_rank.data.store, policy, (*fp32, *layout))
    np.testing.assert_allclose(_reference(one_rank), before, atol=2e-5)
    run_ranks(write_reference, 2, one_rank.data.store, policy, fp32)  # DP 2
    np.testing.assert_array_equal(_reference(one_rank), before)
    other = tmp_path / "run-dpo" / "hf"
    run_ranks(write_reference, 1, one_rank.data.store, other, fp32)
    stale = one_rank.model_copy(update={"run_dir": str(tmp_path / "stale")})
    with pytest.raises(AssertionError, match="of another model, precision, tokenizer or data"):
        run_ranks(train, 1, stale)


def test_pairs_that_share_a_prompt_train_the_same(tmp_path: Path) -> None:
    """A step over all pairs does not depend on whether both responses share the prompt.

    The reference is computed from the rows of each layout, and the first loss is ln 2 + 0.2 x the NLL.
    """
    _rows(tmp_path)
    policy = _initial_policy(tmp_path, _config(tmp_path, "dpo"))
    runs, sizes = [], []
    for layout in ("separate", "isolated"):
        keys: dict[str, Any] = {"model": {"init_from": str(policy)}, "dpo": {"layout": layout}}
        keys["data"] = {"store": str(tmp_path / f"store-{layout}")}
        packed = _config(tmp_path, "dpo", **keys)
        build_store(packed, console=Console(quiet=True))
        sizes.append(len(open_store(packed.data.store, "train")))
        keys["train"] = {"steps": 3, "global_batch": sizes[-1]}
        config = _config(tmp_path, "dpo", **keys).model_copy(update={"run_dir": str(tmp_path / layout)})
        run_ranks(write_reference, 1, packed.data.store, policy, ("precision.dtype=fp32",))
        run_ranks(train, 1, config)
        runs.append(_metrics(tmp_path / layout))
    assert sizes[1] < 0.9 * sizes[0]
    for separate, isolated in zip(*runs, strict=True):
        for name in ("loss", "nll", "margin", "logps_chosen", "logps_rejected", "grad_norm"):
            assert isolated[name] == pytest.approx(separate[name], rel=2e-5, abs=2e-5), name
    assert runs[1][0]["loss"] == pytest.approx(np.log(2) + 0.2 * runs[1][0]["nll"], abs=1e-6)
    with pytest.raises(StoreError, match="holds examples as 'isolated_pairs', this stage needs 'separate'"):
        open_store(tmp_path / "store-isolated", "train", layout="separate")


def test_a_base_without_its_adapter_is_the_stored_reference(tmp_path: Path) -> None:
    """DPO of an adapter compares with the base, whose log-probabilities may also be in the store."""
    _rows(tmp_path)
    policy = _initial_policy(tmp_path, _config(tmp_path, "dpo"))
    keys: dict[str, Any] = {"model": {"init_from": str(policy)}, "adapter": {"rank": 4}}
    stored = _config(tmp_path, "dpo", **keys, dpo={"reference": "store"})
    build_store(stored, console=Console(quiet=True))
    run_ranks(write_reference, 1, stored.data.store, policy, ("precision.dtype=fp32",))
    run_ranks(train, 1, stored)
    base = stored.model_copy(
        update={
            "run_dir": str(tmp_path / "base"),
            "dpo": stored.dpo.model_copy(update={"reference": "base"}),
        }
    )
    run_ranks(train, 1, base)
    for one, other in zip(_metrics(tmp_path / "run-dpo"), _metrics(tmp_path / "base"), strict=True):
        for name in ("loss", "margin", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=1e-6), (one["step"], name)
    adapters = [
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run-dpo", "base")
    ]
    for name, values in adapters[0].items():
        assert torch.allclose(values, adapters[1][name], atol=1e-6), name


def _reference(config: Config) -> np.ndarray:
    import zarr

    values: Any = zarr.open_group(config.data.store, mode="r")["train/reference_logps"]
    return np.asarray(values[:])


def test_bad_pairs(tmp_path: Path) -> None:
    """Bad pairs are refused with their line, or counted if the config allows them.

    Equal responses and empty responses are bad. Nearly equal responses and responses with low ratings are
    dropped and counted. A prompt longer than the pack is refused, or dropped if the config says so.
    """
    good = {"prompt": "What is 1 plus 1?", "chosen": "It is 2.", "rejected": "No idea, maybe 4?"}
    rows = [
        good,
        {**good, "rejected": good["chosen"]},
        {**good, "chosen": "  "},
        {**good, "rating": "slightly_better"},
        {**good, "chosen": "a b c d e f g h i j k l m n o p q r s t u v w x y z " + "1",
         "rejected": "a b c d e f g h i j k l m n o p q r s t u v w x y z " + "2"},
        {**good, "prompt": "long " * 400},
    ]  # fmt: skip
    _rows(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"pairs.jsonl:2.*equal"):
        build_store(_config(tmp_path, "dpo"), console=Console(quiet=True))
    with pytest.raises(ValueError, match=r"longer than data.pack_length=256 \(the longest, row 6"):
        build_store(_config(tmp_path, "dpo", data={"max_bad_rows": 2}), console=Console(quiet=True))
    config = _config(
        tmp_path, "dpo", data={"max_bad_rows": 2, "overlong": "drop", "preferences": {"max_similarity": 0.9}}
    )
    build_store(config, console=Console(quiet=True))
    (counts,) = open_store(config.data.store, "train").sources
    assert (counts.rows, counts.bad, counts.dropped, counts.filtered) == (1, 2, 1, 2)
    with pytest.raises(StoreError, match="holds examples as 'separate', this stage needs 'isolated'"):
        open_store(config.data.store, "train", layout="isolated")
