"""Findings that do not need Slurm. tests/slurm has the others."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from megatron_post.config.load import ConfigError, load_config
from megatron_post.data.build import build_store
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.launch.cluster import Cluster
from megatron_post.launch.preflight import (
    data_findings,
    disk_findings,
    layout_findings,
    memory_findings,
    mount_findings,
    raise_for,
)
from megatron_post.train.shards import checkpoint_bytes
from tests.tiny import tiny_config

CLUSTER = Cluster(gpus_per_node=0, ranks_per_node=4, cpus_per_node=4)


def test_layout_on_nodes() -> None:
    """On 2 nodes x 4 ranks TP 4 fits. TP 2 x PP 3 needs 6 ranks, which do not divide 8."""
    assert layout_findings(tiny_config(parallel={"tensor": 2}), CLUSTER, nodes=2) == []
    config = tiny_config(parallel={"tensor": 2, "pipeline": 3}, model={"num_layers": 3})
    (found,) = layout_findings(config, CLUSTER, nodes=2)
    assert "8 ranks are not a multiple of tensor x pipeline x context = 6" in found


def test_tensor_parallel_across_nodes_is_refused() -> None:
    """With TP 2 on nodes of 3 ranks the group of ranks 2 and 3 is on two nodes."""
    cluster = CLUSTER.model_copy(update={"ranks_per_node": 3})
    config = tiny_config(parallel={"tensor": 2}, train={"global_batch": 3})
    (found,) = layout_findings(config, cluster, nodes=2)
    assert "tensor-parallel groups would cross nodes" in found


CONFIGS = Path(__file__).resolve().parents[3] / "configs"
H100 = Cluster(gpus_per_node=8, cpus_per_node=96)


def test_memory_that_does_not_fit() -> None:
    """70B without context parallelism: 81.5 GiB on the first pipeline rank. Remedies are in launch's terms.
    A larger GPU, one that is not named, and none have nothing against it."""
    config = load_config(CONFIGS / "llama3_70b" / "sft.yaml", ["parallel.context=1"])
    (found,) = memory_findings(config, H100, nodes=8)
    first, *remedies = found.splitlines()
    assert re.search(r"rank 0 takes 8\d\.\d GiB, h100-80gb has 79\.6 GiB: 1\.\d GiB too much$", first)
    assert any(line.startswith("  parallel.context=2 fits: ") for line in remedies)
    assert not any("--gpus" in line for line in remedies)
    assert memory_findings(config, H100.model_copy(update={"gpu": "h200-141gb"}), nodes=8) == []
    assert memory_findings(config, H100.model_copy(update={"gpu": None}), nodes=8) == []
    assert memory_findings(tiny_config(), CLUSTER, nodes=2) == []
    with pytest.raises(ValueError, match="'mi300x' is not in the planner's table: choose one of h100-80gb"):
        memory_findings(config, H100.model_copy(update={"gpu": "mi300x"}), nodes=8)


def test_user_buffers_need_kernels_in_order_of_launch() -> None:
    parallel = {"tensor": 2, "sequence": True, "tp_comm_overlap": True}
    config = tiny_config(parallel=parallel, precision={"dtype": "bf16"}, train={"global_batch": 8})
    (found,) = layout_findings(config, H100, nodes=1)
    assert "parallel.tp_comm_overlap=true needs" in found
    assert 'Set environment.CUDA_DEVICE_MAX_CONNECTIONS="1"' in found
    ordered = H100.model_copy(update={"environment": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}})
    for cluster in (ordered, H100.model_copy(update={"gpu": "b200-180gb"})):
        assert layout_findings(config, cluster, nodes=1) == []


def test_fp8_that_the_clusters_gpu_does_not_have() -> None:
    """MXFP8 on H100s is refused before the job queues. A cluster file with `gpu: null` is not checked."""
    config = load_config(CONFIGS / "llama3_8b" / "sft.yaml", ["precision.fp8=mxfp8"])
    (found,) = layout_findings(config, H100, nodes=1)
    assert found.startswith("precision.fp8=mxfp8 needs GPUs of compute capability 10.0")
    for gpu in ("b200-180gb", None):
        assert layout_findings(config, H100.model_copy(update={"gpu": gpu}), nodes=1) == []


def test_fp8_that_the_torch_of_the_ranks_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks run this interpreter, unless the cluster file names another or a container."""
    config = load_config(CONFIGS / "llama3_8b" / "sft.yaml", ["precision.fp8=blockwise"])
    monkeypatch.setattr("torch.version.cuda", "12.8")
    (found,) = layout_findings(config, H100, nodes=1)
    assert "precision.fp8=blockwise needs CUDA 12.9 or newer" in found
    other = H100.model_copy(update={"python": "/opt/venv/bin/python"})
    assert layout_findings(config, other, nodes=1) == []
    monkeypatch.setattr("torch.version.cuda", "12.9")
    assert layout_findings(config, H100, nodes=1) == []


def test_more_nodes_as_a_remedy() -> None:
    """DPO of 405B does not fit on 64 GPUs, because the optimizer's shards need four times as many."""
    config = load_config(CONFIGS / "llama3_405b" / "dpo.yaml")
    (found,) = memory_findings(config, H100, nodes=8)
    assert "  --nodes 32 fits: " in found
    assert memory_findings(config, H100, nodes=32) == []


def test_missing_and_unsuitable_data(tmp_path: Path) -> None:
    """Each missing part has a finding, and so has a store that was packed with another tokenizer."""
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "1"}, '
                                         '{"role": "assistant", "content": "2"}]}\n')  # fmt: skip
    values: dict[str, Any] = {
        "tokenizer": {"path": "tokenizer"},
        "data": {"store": "store", "sources": [{"name": "rows", "path": str(tmp_path / "rows.jsonl")}]},
        "model": {"vocab_size": 512, "init_from": "weights"},
    }
    config = tiny_config(**values)
    found = data_findings(config, tmp_path)
    assert [text.split("=")[0].split(",")[0] for text in found] == [
        "model.init_from", "tokenizer.path", "data.store",
    ]  # fmt: skip
    (tmp_path / "weights").mkdir()
    train_small_tokenizer(["some text"], 300).save(tmp_path / "tokenizer")
    packed = {**values, "tokenizer": {"path": str(tmp_path / "tokenizer")}}
    packed["data"] = {**values["data"], "store": str(tmp_path / "store")}
    build_store(tiny_config(**packed), console=Console(quiet=True))
    assert data_findings(config, tmp_path) == []
    train_small_tokenizer(["other words altogether"], 280).save(tmp_path / "tokenizer")
    (found_text,) = data_findings(config, tmp_path)
    assert "was made with tokenizer" in found_text


class _Usage(NamedTuple):
    free: int


def test_free_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep=2 needs space for exactly 3 checkpoints. A checkpoint that exists needs no more space."""
    config = tiny_config(tmp_path / "run", checkpoint={"keep": 2})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(3 * checkpoint_bytes(config)))
    assert disk_findings(config, tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(3 * checkpoint_bytes(config) - 1))
    (found,) = disk_findings(config, tmp_path)
    assert "3 checkpoints must fit on the disk (checkpoint.keep=2, and" in found and "GB free" in found
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert disk_findings(config, tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(2 * checkpoint_bytes(config) - 1))
    (found,) = disk_findings(config, tmp_path)
    assert "(checkpoint.keep=2, and the one being written): the 2 that are not there yet take" in found


def test_paths_outside_the_container(tmp_path: Path) -> None:
    """A path has a finding if it is not mounted, or is mounted under another name."""
    config = tiny_config(tmp_path / "run", tokenizer={"path": "/models/t"}, data={"store": "/data/s"})
    found = mount_findings(config, tmp_path, [f"{tmp_path}:{tmp_path}", "/data:/elsewhere"])
    assert [text for text in found if "does not exist" not in text] == [
        "tokenizer.path: /models/t is under no container mount of the same path inside and outside",
        "data.store: /data/s is under no container mount of the same path inside and outside",
    ]
    assert mount_findings(tiny_config(), tmp_path, [f"{tmp_path}:{tmp_path}:ro"]) == []


def test_all_findings_in_one_error() -> None:
    with pytest.raises(ConfigError, match=r"x.yaml: 2 finding\(s\), nothing was queued\n  - one\n  - two"):
        raise_for(["one", "two"], "x.yaml")
    raise_for([], "x.yaml")
