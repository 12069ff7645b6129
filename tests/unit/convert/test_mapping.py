"""The table of names and layouts: tensors that are cut and joined are identical bit for bit."""

import pytest
import torch

from megatron_post.convert.hf_reader import RandomWeights, SafetensorsDirectory
from megatron_post.convert.mapping import (
    RULES,
    SCORE,
    SCORE_BIAS,
    hf_from_shards,
    hf_shapes,
    interleave_qkv,
    shard_from_hf,
    split_qkv,
)
from tests.tiny import tiny_config

MODEL = tiny_config().model


def test_qkv_by_hand() -> None:
    """With 4 query heads, 2 groups and head_dim 1 the rows are q0 q1 k0 v0, q2 q3 k1 v1."""
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    qkv = interleave_qkv(q, k, v, groups=2)
    assert qkv.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert all(
        torch.equal(a, b) for a, b in zip(split_qkv(qkv, groups=2, head_dim=1), (q, k, v), strict=True)
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.core)
def test_shards_rejoin_to_the_tensor(rule, size: int) -> None:
    names = tuple(name.format(1) for name in rule.hf)
    is_score = rule.hf in (SCORE, SCORE_BIAS)
    source, padded = RandomWeights(MODEL, seed=0, scalar_head=is_score, scores_steps=is_score), 256
    shards = [
        shard_from_hf(rule, names, source.read, MODEL, rank=r, size=size, padded_vocab=padded)
        for r in range(size)
    ]
    for name, value in hf_from_shards(rule, names, shards, MODEL).items():
        assert torch.equal(value, source.read(name, None, 0, 0)), name


def test_padded_rows_are_zero_and_not_exported() -> None:
    """250 rows are padded to 256 over 2 ranks. The second rank holds 122 real rows and 6 rows of zeros."""
    rule = RULES[0]
    source = RandomWeights(MODEL, seed=0)
    shard = shard_from_hf(rule, rule.hf, source.read, MODEL, rank=1, size=2, padded_vocab=256)
    assert (
        shard.shape == (128, 64)
        and shard[122:].abs().max() == 0
        and shard[:122].abs().min(dim=1).values.max() > 0
    )


def test_405b_has_the_published_parameters_and_tensors() -> None:
    from megatron_post.config.sections import Model

    shapes = hf_shapes(Model(preset="llama3.1_405b"))  # type: ignore[call-arg]
    assert len(shapes) == 1137
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 405_853_388_800


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "is not a Hugging Face model directory"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled .bin weights"),
        (lambda d: (d / "model.safetensors").unlink(), "holds neither"),
        (lambda d: _truncate(d / "model.safetensors"), "model.norm.weight: ends at byte .*: truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "not a readable safetensors file"),
        (
            lambda d: _edit(d / "config.json", '"vocab_size": 250', '"vocab_size": 251'),
            "model.vocab_size: 250 in the",
        ),
        (
            lambda d: _edit(d / "config.json", '"rope_type": "llama3"', '"rope_type": "yarn"'),
            "rope_type='yarn'",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "points outside",
        ),
    ],
)
def test_bad_directories_are_refused(tmp_path, break_it, message: str) -> None:
    _write_hf(tmp_path)
    SafetensorsDirectory(tmp_path, MODEL)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message):
        SafetensorsDirectory(tmp_path, MODEL)


def _write_hf(directory) -> None:
    import json

    from safetensors.torch import save_file

    from megatron_post.convert.hf_config import to_hf_config

    source = RandomWeights(MODEL, seed=0)
    save_file(
        {name: source.read(name, None, 0, 0) for name in hf_shapes(MODEL)}, directory / "model.safetensors"
    )
    values = to_hf_config(MODEL, dtype="float32", bos_id=None, eos_ids=[], pad_id=None)
    (directory / "config.json").write_text(json.dumps(values))


def _truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
