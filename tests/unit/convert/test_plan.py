"""Plans from configs and indices alone, and the grouping of real models into files."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_post.config.sections import Model
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.inspect import inspect
from megatron_post.convert.mapping import hf_shapes
from megatron_post.convert.plan import plan, print_plan
from megatron_post.convert.shards import parse_size, plan_shards, shard_name
from megatron_post.convert.source import Kind
from tests.unit.convert.models import shaped_like, to_megatron, weights_of, write_hf


def _kinds(preset: str) -> dict[str, Kind]:
    model = Model(preset=preset)  # type: ignore[call-arg]
    return {name: Kind(torch.bfloat16, shape) for name, shape in hf_shapes(model).items()}


@pytest.mark.parametrize(
    ("preset", "files"), [("llama3.1_8b", 4), ("llama3.1_70b", 30), ("llama3.1_405b", 191)]
)
def test_as_many_files_as_published(preset: str, files: int) -> None:
    """Meta's repositories on the hub have 4, 30 and 191 files, made with transformers' 5 GB."""
    shards = plan_shards(_kinds(preset), max_bytes=5 * 10**9)
    assert len(shards) == files
    assert shard_name(files - 1, files) == f"model-{files:05d}-of-{files:05d}.safetensors"


@pytest.mark.parametrize("max_bytes", [1, 20_000, 33_000, 10**6])
def test_grouped_as_transformers_does(max_bytes: int) -> None:
    """The groups equal those of the function that `save_pretrained` calls.

    Some tensors are larger than the limit, and some are smaller.
    """
    hub = pytest.importorskip("huggingface_hub")
    tensors = weights_of(shaped_like("8b"))
    expected = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=max_bytes)
    shards = plan_shards({n: Kind(t.dtype, tuple(t.shape)) for n, t in tensors.items()}, max_bytes=max_bytes)
    assert shards == list(expected.filename_to_tensors.values())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("4GiB", 4 * 2**30), ("1.5MB", 1_500_000), ("1000", 1000), ("2 tb", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5 apples", "1e9", "9" * 400 + " apples"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        parse_size(text)


def test_plan_of_405b_without_weights(tmp_path: Path) -> None:
    """The plan of the published config and index.

    There are 1,137 tensors in 191 files, with 2 bytes for each of 405,853,388,800 parameters. At 1,000 MB/s
    they take 812 s, which is 13 min 32 s. At the 800 MB/s of one worker they take 1,015 s. The memory stays
    far below 2 x 4.2 GB + 1 GiB.
    """
    model = Model(preset="llama3.1_405b")  # type: ignore[call-arg]
    values = to_hf_config(model, dtype="bfloat16", bos_id=128000, eos_ids=[128001], pad_id=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    shards = plan_shards(_kinds("llama3.1_405b"), max_bytes=5 * 10**9)
    weight_map = {name: shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 811706777600}, "weight_map": weight_map}))
    result = plan(
        str(tmp_path), dtype="bf16", max_shard_bytes=5 * 10**9, workers=2, megabytes_per_second=1000
    )
    assert (result.tensors, result.total_bytes, result.shards) == (1137, 811_706_777_600, 191)
    assert result.largest_bytes == 128256 * 16384 * 2
    assert result.seconds == pytest.approx(811.7, abs=0.1)
    assert result.peak_bytes < 2 * result.largest_bytes + 2**30 and not result.workers_decide
    one = plan(str(tmp_path), dtype="bf16", max_shard_bytes=10**10, workers=1, megabytes_per_second=2000)
    assert one.seconds == pytest.approx(1014.6, abs=0.1) and one.workers_decide
    out = io.StringIO()
    print_plan("405B", result, console=Console(file=out, width=80))
    assert "1,137" in out.getvalue() and "0 h 14 min" in out.getvalue()
    del weight_map["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"1 tensor\(s\) missing, the first is model.norm.weight"):
        plan(str(tmp_path), dtype="bf16", max_shard_bytes=1, workers=1, megabytes_per_second=1)


def test_inspect(tmp_path: Path) -> None:
    """Both kinds of directory have one row for the 3 layers: three tensors or one stack."""
    model = shaped_like("8b")
    write_hf(tmp_path / "hf", model, weights_of(model))
    to_megatron(tmp_path / "hf", tmp_path / "checkpoints")
    texts = []
    for name in ("hf", "checkpoints"):
        out = io.StringIO()
        inspect(str(tmp_path / name), console=Console(file=out, width=150))
        texts.append(" ".join(out.getvalue().split()))
    assert "model.layers.*.mlp.down_proj.weight 3 64 x 224 float32 172,032" in texts[0]
    assert "decoder.layers.mlp.linear_fc2.weight 1 3 x 64 x 224 float32 172,032" in texts[1]
    assert "step 0, weights only" in texts[1] and "num_layers 3" in texts[0]
