"""Tests of merges on disk, of invalid merges, and of equality with mergekit's results."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from megatron_post.config.load import ConfigError
from megatron_post.convert import jobs
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.rounds import merge as module
from megatron_post.rounds.merge import merge
from megatron_post.rounds.merge_settings import load_merge
from tests.unit.convert.models import shaped_like, to_megatron, weights_of, write_hf

MODEL = shaped_like("8b")
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def _write(directory: Path, seed: int, *, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """Write a model that is similar to the common one. Its weights have noise of half their scale."""
    tensors = weights_of(MODEL)
    torch.manual_seed(seed)
    noisy = {n: (t + 0.05 * torch.randn(t.shape)).to(dtype) for n, t in tensors.items()}
    return write_hf(directory, MODEL, noisy, **kwargs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories base, a and b of one model, and a's weights as a checkpoint."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        _write(root / name, seed, shards=1 + seed)
    to_megatron(root / "a", root / "checkpoints")
    return root


def _merged(root: Path, output: Path, method: Any, values: dict[str, Any]) -> dict[str, Tensor]:
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    assert merge(load_merge(config, method), output, report=print).is_complete
    return load_file(output / "model.safetensors")


def _values(root: Path, *, first: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    models = [{"model": str(root / "a"), **(first or {})}, {"model": str(root / "b"), "weight": 3.0}]
    return {"models": models, **more}


def _loaded(directory: Path) -> dict[str, Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def test_linear_with_layer_patterns(models: Path, tmp_path: Path) -> None:
    """The weights are 1 : 3. The first model has the weight 0 in layer 1, and 9 for the final norm."""
    layers = [{"tensors": "model.layers.1.*", "weight": 0.0}, {"tensors": NORM, "weight": 9.0}]
    found = _merged(models, tmp_path / "out", "linear", _values(models, first={"layers": layers}))
    a, b = _loaded(models / "a"), _loaded(models / "b")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], (a[name] + 3 * b[name]) / 4)
    assert torch.equal(found[QUERY], b[QUERY])
    torch.testing.assert_close(found[NORM], (9 * a[NORM] + 3 * b[NORM]) / 12)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties"])
def test_reproducible_and_from_any_format(
    models: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint gives the same bytes as Hugging Face's files, with any size of blocks."""
    values = _values(models, first={"density": 0.4} if "ties" in method else {})
    values |= {"base_model": str(models / "base")} if "ties" in method else {}
    first = _merged(models, tmp_path / "one", method, values)
    values["models"][0]["model"] = str(models / "checkpoints")
    monkeypatch.setattr("megatron_post.convert.to_hf.row_blocks", lambda kind: [(0, 1), (1, kind.shape[0])])
    monkeypatch.setattr("megatron_post.convert.to_hf.BLOCK_BYTES", 2**24)
    second = _merged(models, tmp_path / "two", method, values)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_slerp_of_equal_models_is_that_model(models: Path, tmp_path: Path) -> None:
    pair = [{"model": str(models / "a"), "weight": w} for w in (0.3, 0.45)]
    found = _merged(models, tmp_path / "out", "slerp", {"models": pair})
    assert all(torch.equal(found[name], tensor) for name, tensor in _loaded(models / "a").items())


def test_dare_of_equal_models_is_unbiased(models: Path, tmp_path: Path) -> None:
    """If half of the values are dropped in each of two equal models, the mean delta stays that of the model.

    Each merged value is d x (m1 + m2) with independent masks of probability 1/2, and has the variance d^2 /
    2. Over n values the sum of d x (m1 + m2 - 1) has the standard deviation sqrt(sum d^2 / 2).
    """
    pair = [{"model": str(models / "a"), "density": 0.5} for _ in range(2)]
    found = _merged(
        models, tmp_path / "out", "dare_ties", {"models": pair, "base_model": str(models / "base")}
    )
    base, a = _loaded(models / "base"), _loaded(models / "a")
    delta, merged = (a[QUERY] - base[QUERY]).double(), (found[QUERY] - base[QUERY]).double()
    # Smaller deltas cannot be distinguished from float32's rounding.
    ratio = (merged / delta)[delta.abs() > 1e-3]
    assert set(ratio.round().tolist()) == {0.0, 1.0, 2.0}
    assert abs((merged * delta).sum() - (delta**2).sum()) < 4 * ((delta**4).sum() / 2).sqrt()


def test_a_killed_merge_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's name does not exist until the merge is complete, and finished parts are kept."""
    plan = tmp_path / "merge.yaml"
    plan.write_text(yaml.safe_dump(_values(models)))
    job = module.MergeJob(load_merge(plan, "linear").model_dump_json(), str(tmp_path / "out"), None, 150_000)
    write = module.MergeJob.write_part
    monkeypatch.setattr(
        module.MergeJob, "write_part", lambda self, n, file: 1 / 0 if n == 2 else write(self, n, file)
    )
    with pytest.raises(ZeroDivisionError):
        jobs.convert(job, workers=1, report=print)
    assert not (tmp_path / "out").exists() and len(job.parts) > 3
    monkeypatch.undo()
    said: list[str] = []
    jobs.convert(job, workers=1, report=said.append)
    assert f"2 of {len(job.parts)} parts are complete" in said[0]
    whole = _merged(models, tmp_path / "whole", "linear", _values(models))
    assert all(torch.equal(whole[name], tensor) for name, tensor in _loaded(tmp_path / "out").items())


def _with_tokenizer(directory: Path, text: str) -> Path:
    train_small_tokenizer([text], 270).save(directory)
    return directory


def test_what_is_refused(models: Path, tmp_path: Path) -> None:
    other = shaped_like("8b", tied=True)
    write_hf(tmp_path / "tied", other, weights_of(other))
    write_hf(tmp_path / "score", MODEL, weights_of(MODEL, scalar_head=True), scalar_head=True)
    for name, text in (("one", "hello hello hello"), ("two", "other words, other words")):
        _with_tokenizer(_write(tmp_path / name, 5), text)
    a = str(models / "a")
    wide = MODEL.model_copy(update={"vocab_size": MODEL.vocab_size + 64})
    write_hf(tmp_path / "wide", wide, weights_of(wide))
    shadowed = [{"tensors": "model.layers.*", "weight": 0.5}, {"tensors": QUERY, "weight": 1.0}]
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("linear", {"models": [{"model": a}, {"model": str(tmp_path / "wide")}]}, "vocab_size"),
        ("linear", {"models": [{"model": a, "layers": shadowed}, {"model": a}]}, "narrower pattern first"),
        ("linear", {"models": [{"model": a, "weight": math.inf}, {"model": a}]}, "finite number"),
        ("linear", {"models": [{"model": a}, {"model": str(tmp_path / "tied")}]}, "tie_word_embeddings"),
        ("linear", {"models": [{"model": a}, {"model": str(tmp_path / "score")}]}, "one is a reward model"),
        (
            "linear",
            {"models": [{"model": str(tmp_path / "one")}, {"model": str(tmp_path / "two")}]},
            "tokenizers differ",
        ),
        ("ties", {"models": [{"model": a}, {"model": a}]}, "set `base_model`"),
        ("linear", {"models": [{"model": a}, {"model": a}], "base_model": a}, "linear has none"),
        ("slerp", {"models": [{"model": a}] * 3}, "slerp merges two models, not 3"),
        ("linear", {"models": [{"model": a, "density": 0.5}, {"model": a}]}, "linear has no density"),
        ("linear", {"models": [{"model": a, "weight": -1.0}, {"model": a}]}, "weight"),
        ("linear", {"models": [{"model": a, "weights": 1.0}, {"model": a}]}, "unknown key"),
        ("linear", {"models": [{"model": a, "weight": 0.0}, {"model": a, "weight": 0.0}]}, "sum to 0"),
        (
            "linear",
            {"models": [{"model": a, "layers": [{"tensors": "layers.0.*", "weight": 1.0}]}, {"model": a}]},
            "no tensor matches the pattern",
        ),
    ]
    for number, (method, values, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            _merged(models, tmp_path / f"out{number}", method, values)
        assert not (tmp_path / f"out{number}").exists()
    with pytest.raises(ConfigError, match="does not exist"):
        load_merge(tmp_path / "none.yaml", "linear")


def test_the_same_tokenizer_in_another_spelling_passes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _with_tokenizer(_write(tmp_path / name, 5), "hello hello")
    path = tmp_path / "two" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    models = [{"model": str(tmp_path / name)} for name in ("one", "two")]
    assert _merged(tmp_path, tmp_path / "out", "linear", {"models": models})


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_equal_to_mergekit(models: Path, tmp_path: Path, method: str) -> None:
    """If mergekit is installed, which is not a requirement, all values are within 1e-6 of its values."""
    pytest.importorskip("mergekit.config", reason="mergekit is not installed")
    run_merge = importlib.import_module("mergekit.merge").run_merge
    options = importlib.import_module("mergekit.options").MergeOptions(copy_tokenizer=False)
    configuration = importlib.import_module("mergekit.config").MergeConfiguration
    a, b, base = (str(models / name) for name in ("a", "b", "base"))
    theirs: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    ours = _values(models)
    if method == "slerp":  # t = 0.75 from mergekit's base, which is the first model here
        theirs |= {"models": [{"model": a}, {"model": b}], "base_model": a, "parameters": {"t": 0.75}}
    else:
        theirs["models"] = [
            {"model": a, "parameters": {"weight": 1.0, "density": 0.4}},
            {"model": b, "parameters": {"weight": 3.0, "density": 0.7}},
        ]
    if method == "ties":
        theirs["base_model"] = ours["base_model"] = base
        ours["models"][0]["density"], ours["models"][1]["density"] = 0.4, 0.7
    if method == "linear":
        for model in theirs["models"]:
            del model["parameters"]["density"]
    run_merge(configuration.model_validate(theirs), str(tmp_path / "theirs"), options=options)
    found, expected = _merged(models, tmp_path / "ours", method, ours), _loaded(tmp_path / "theirs")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=name)
