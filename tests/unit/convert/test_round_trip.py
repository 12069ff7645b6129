"""Round trips return the same bytes for any shape, head, sharding and number of workers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_post.convert.hf_reader import RandomWeights
from megatron_post.convert.mapping import core_tensors, row_ranges, shard_from_hf
from megatron_post.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_post.convert.open_model import open_model
from megatron_post.convert.source import read_rows
from megatron_post.convert.verify import compare_models
from megatron_post.storage import manifest
from tests.unit.convert.models import shaped_like, to_hf, to_megatron, weights_of, write_hf


@pytest.mark.parametrize("kind", ["untied", "tied", "score", "tied, score", "score of steps"])
@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_round_trip_is_bit_exact(tmp_path: Path, size: str, kind: str) -> None:
    """HF -> Megatron -> HF returns identical files, configs and tokenizer included, with a model card."""
    model, head = shaped_like(size, tied="tied" in kind), {"scalar_head": "score" in kind}
    head["scores_steps"] = "steps" in kind
    tensors = weights_of(model, dtype=torch.bfloat16, **head)
    assert ("score.bias" in tensors) == ("steps" in kind)
    write_hf(tmp_path / "hf", model, tensors, **head)
    to_megatron(tmp_path / "hf", tmp_path / "checkpoints")
    to_hf(tmp_path / "checkpoints", tmp_path / "back")
    before = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    after = {file.name: file.read_bytes() for file in (tmp_path / "back").iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"README.md", "training_record.json"}
    manifest.verify_step(manifest.step_directory(tmp_path / "checkpoints", 0))


@pytest.mark.parametrize("size", ["8b", "405b"])
@pytest.mark.parametrize("scalar_head", [False, True])
def test_row_ranges_make_up_one_ranks_parameters(size: str, scalar_head: bool) -> None:
    """Parameters that are joined from row ranges equal those that the trainer cuts for one rank."""
    model = shaped_like(size)
    source = RandomWeights(model, seed=1, scalar_head=scalar_head)
    count = 0
    for core in core_tensors(model, scalar_head=scalar_head):
        rows = [
            source.read(run.name, None, 0, 0)[run.hf_row : run.hf_row + run.rows]
            for run in row_ranges(core, model)
        ]
        whole = shard_from_hf(
            core.rule, core.hf, source.read, model, rank=0, size=1, padded_vocab=model.vocab_size
        )
        assert torch.equal(torch.cat(rows), whole) and whole.shape == core.shape, core.key
        count += whole.numel()
    h, f, kv = model.hidden_size, model.ffn_hidden_size, 8 * model.head_dim
    head = h if scalar_head else model.vocab_size * h
    layer = 2 * h * h + 2 * kv * h + 3 * f * h + 2 * h
    assert count == model.vocab_size * h + 3 * layer + h + head


def test_shards_and_workers(tmp_path: Path) -> None:
    """A sharded source is converted by two processes, and back to small shards. The models are equal."""
    model = shaped_like("8b")
    tensors = weights_of(model)
    write_hf(tmp_path / "hf", model, tensors, shards=4)
    to_megatron(tmp_path / "hf", tmp_path / "checkpoints", workers=2)
    parts = list((tmp_path / "checkpoints" / "step-00000000").glob("*.distcp"))
    assert len(parts) >= 4
    to_hf(tmp_path / "checkpoints", tmp_path / "back", max_shard_bytes=100_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 4 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    back = {name: value for file in files for name, value in load_file(file).items()}
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in back)
    weight_map = {name: file.name for file in files for name in load_file(file)}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    metadata = {"total_parameters": numbers, "total_size": 4 * numbers}
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    assert (tmp_path / "back" / "model.safetensors.index.json").read_text() == index
    compare_models(str(tmp_path / "checkpoints"), str(tmp_path / "back"), report=print)
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "checkpoints").glob(".[!l]*"))


def test_cast_rounds_as_torch_does(tmp_path: Path) -> None:
    """--dtype rounds as torch does, and the config names the new dtype."""
    model = shaped_like("8b")
    tensors = weights_of(model)
    write_hf(tmp_path / "hf", model, tensors)
    to_hf(to_megatron(tmp_path / "hf", tmp_path / "checkpoints", dtype="bf16"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensors[name].bfloat16()) for name in tensors)
    assert '"torch_dtype": "bfloat16"' in (tmp_path / "back" / "config.json").read_text()


def test_mixed_dtypes(tmp_path: Path) -> None:
    """fp32 norms beside bf16 matrices are kept. Two dtypes in tensors that are stacked are refused."""
    model = shaped_like("8b")
    tensors = weights_of(model, dtype=torch.bfloat16)
    tensors = {name: t.float() if t.dim() == 1 else t for name, t in tensors.items()}
    write_hf(tmp_path / "hf", model, tensors)
    to_hf(to_megatron(tmp_path / "hf", tmp_path / "checkpoints"), tmp_path / "back")
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    odd = "model.layers.1.self_attn.k_proj.weight"
    write_hf(tmp_path / "odd", model, tensors | {odd: tensors[odd].float()})
    with pytest.raises(ValueError, match=f"{odd} is torch.float32.*--dtype"):
        to_megatron(tmp_path / "odd", tmp_path / "other")
    to_megatron(tmp_path / "odd", tmp_path / "other", dtype="fp32")


def test_every_row_range_is_read_correctly(tmp_path: Path) -> None:
    """Any rows of any tensor, across chunks and query groups, equal those of the Hugging Face tensor."""
    model = shaped_like("70b")
    tensors = weights_of(model)
    write_hf(tmp_path / "hf", model, tensors)
    source = MegatronCheckpoint(to_megatron(tmp_path / "hf", tmp_path / "checkpoints"))
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        for start, end in ((0, 1), (rows // 3, rows // 3 + 5), (1, rows), (rows - 1, rows)):
            assert torch.equal(read_rows(source, name, start, min(end, rows)), tensor[start:end]), name


def test_verify_names_the_difference(tmp_path: Path) -> None:
    model = shaped_like("8b")
    tensors = weights_of(model)
    write_hf(tmp_path / "a", model, tensors)
    name = "model.layers.2.mlp.up_proj.weight"
    changed = tensors[name].clone()
    changed[5, 7] = -changed[5, 7]
    write_hf(tmp_path / "b", model, tensors | {name: changed})
    with pytest.raises(ValueError, match=rf"{name}: 1 value\(s\) differ, the first at \[5, 7\]"):
        compare_models(str(tmp_path / "a"), str(tmp_path / "b"), report=print)
    write_hf(tmp_path / "c", model, {n: t.bfloat16() for n, t in tensors.items()})
    with pytest.raises(ValueError, match=r"float32 and .* bfloat16"):
        compare_models(str(tmp_path / "a"), str(tmp_path / "c"), report=print)
    write_hf(tmp_path / "d", shaped_like("70b"), weights_of(shaped_like("70b")))
    with pytest.raises(ValueError, match=r"num_attention_heads: 32 in the first, 64 in the second"):
        compare_models(str(tmp_path / "a"), str(tmp_path / "d"), report=print)


def test_nan_equals_itself_and_signed_zeros_differ(tmp_path: Path) -> None:
    model = shaped_like("8b")
    tensors = weights_of(model)
    tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), 0.0])
    write_hf(tmp_path / "a", model, tensors)
    compare_models(str(tmp_path / "a"), str(tmp_path / "a"), report=print)
    tensors["model.norm.weight"][1] = -0.0
    write_hf(tmp_path / "b", model, tensors)
    with pytest.raises(ValueError, match=r"model.norm.weight: 1 value"):
        compare_models(str(tmp_path / "a"), str(tmp_path / "b"), report=print)
    assert open_model(tmp_path / "a").tensors["model.norm.weight"].shape == (64,)
