"""A converted model trains in any layout, and its checkpoints convert back. The commands work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file

from megatron_post.config.schema import Config
from megatron_post.convert.dist_checkpoint import DistCheckpoint
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.jobs import convert
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.stages.sft import SFT
from megatron_post.storage import manifest
from megatron_post.train.converted import check_weights
from megatron_post.train.loading import load_checkpoint
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.step import Stepper
from tests.e2e.runs import small_run, start
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs
from tests.unit.convert.models import shaped_like, to_hf, to_megatron, weights_of, write_hf

LAYOUTS = {
    "TP2": (2, ("parallel.tensor=2",)),
    "PP2": (2, ("parallel.pipeline=2",)),
    "TP2 x PP2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "DP2": (2, ()),
    "PP2 x VPP2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
}


def _run(directory: Path, command: list[str], *, ranks: int = 1, status: int = 0) -> str:
    log = directory / "log"
    log.unlink(missing_ok=True)
    assert start(command, ranks=ranks, log=log).wait(timeout=400) == status, log.read_text()
    return log.read_text()


@pytest.mark.slow
def test_trains_in_any_layout_and_converts_back(tmp_path: Path) -> None:
    """HF -> Megatron -> one step at a rate that changes nothing in fp32 -> Megatron -> HF has the same bytes.

    The vocabulary of 511 is padded to 512 over two tensor-parallel ranks. Loss and gradient norm equal those
    of one rank that starts from the directory itself. After a real step, the next loss is also equal. Sums of
    fp32 in another order differ by about 1e-6.
    """
    config = small_run(tmp_path, model={"vocab_size": 511}, train={"steps": 1})
    tensors = weights_of(config.model)
    hf = write_hf(tmp_path / "hf", config.model, tensors, shards=3)
    command = ["train", str(tmp_path / "config.yaml")]
    two_steps = ["train.steps=2", "train.export_hf=false"]
    _run(tmp_path, [*command, f"run_dir={tmp_path / 'one'}", f"model.init_from={hf}", *two_steps])
    expected = _metrics(tmp_path / "one")
    for name, (ranks, overrides) in LAYOUTS.items():
        run = tmp_path / name.replace(" ", "")
        to_megatron(hf, run / "checkpoints")
        log = _run(tmp_path, [*command, f"run_dir={run}", "optimizer.lr=1e-30", *overrides], ranks=ranks)
        assert f"starting from the weights in {run}/checkpoints/step-00000000" in log
        np.testing.assert_allclose(_metrics(run), expected[:1], rtol=1e-4, err_msg=name)
        to_hf(run / "checkpoints", run / "back")
        after = load_file(run / "back" / "model.safetensors")
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[n], tensors[n]) for n in tensors), name
        exported = {n: t for f in (run / "hf").glob("*.safetensors") for n, t in load_file(f).items()}
        assert all(torch.equal(exported[n], tensors[n]) for n in tensors), name
    run = tmp_path / "two"
    to_megatron(hf, run / "checkpoints")
    _run(tmp_path, [*command, f"run_dir={run}", *two_steps, "parallel.tensor=2"], ranks=2)
    np.testing.assert_allclose(_metrics(run), expected, rtol=1e-4)
    assert abs(expected[0][0] - expected[1][0]) > 1e-3 * expected[0][0]
    text = _run(tmp_path, ["convert", "inspect", str(tmp_path / "PP2" / "checkpoints")])
    assert "step 1, weights and optimizer" in text and "optimizer.state.exp_avg" in text
    # An exported directory converts as well, byte for byte if there is one pipeline stage.
    back = (tmp_path / "TP2" / "back" / "model.safetensors").read_bytes()
    assert (tmp_path / "TP2" / "hf" / "model.safetensors").read_bytes() == back


def _metrics(run: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


def test_command_line(tmp_path: Path) -> None:
    """Every command runs once. A user's error gives a message and status 2."""
    model = shaped_like("8b")
    hf, root, back = (str(tmp_path / name) for name in ("hf", "run/checkpoints", "back"))
    write_hf(tmp_path / "hf", model, weights_of(model))
    assert "is complete" in _run(tmp_path, ["convert", "hf-to-megatron", hf, root, "--dtype", "bf16"])
    _run(tmp_path, ["convert", "megatron-to-hf", root, back, "--max-shard-size", "100KB", "--step", "0"])
    assert len(list(Path(back).glob("*.safetensors"))) > 2
    assert "equal bit for bit" in _run(tmp_path, ["convert", "verify", root, back])
    refused = _run(tmp_path, ["convert", "verify", hf, back], status=2)
    assert "float32 and" in refused and "Traceback" not in refused


def _logits(configs: list[Config], tokens: np.ndarray) -> list[np.ndarray]:
    results = []
    for config in configs:
        with parallel_run(config.parallel, seed=1) as topology:
            models = build_model(config, topology)
            load_weights(models, open_weights(config.model, seed=99), config.model)
            chunks = wrap_data_parallel(models, config, topology)
            optimizer = build_optimizer(chunks, config)
            step = manifest.step_directory(Path(config.run_dir) / "checkpoints", 0)
            source = DistCheckpoint(step, is_verified=True)
            load_checkpoint(source, chunks, optimizer, weights_only=True)
            stepper = Stepper(chunks, SFT(["body"]), topology, portable=True)
            pack = tiny_packs(1)[0]
            from dataclasses import replace

            cu_seqlens = np.array([0, len(tokens)], np.int32)
            roles = np.full(len(tokens), 3, np.uint8)
            packed = stepper.prepare(replace(pack, tokens=tokens, roles=roles, cu_seqlens=cu_seqlens)).packed
            ids = torch.from_numpy(tokens).long()[None]
            (chunk,) = unwrap_model(chunks)
            with torch.no_grad():
                results.append(chunk(ids, None, None, labels=None, packed_seq_params=packed)[:, 0].numpy())
    return results


def test_logits_equal_transformers(tmp_path: Path) -> None:
    """The trainer's logits from a converted checkpoint equal those of `transformers` after the way back.

    Every size's shape is tested. fp32 sums of up to 832 terms in another order differ by about 1e-6.
    """
    transformers = pytest.importorskip("transformers")
    configs = []
    for size, tied in (("8b", False), ("70b", True), ("405b", False)):
        model = shaped_like(size, tied=tied)
        write_hf(tmp_path / size / "hf", model, weights_of(model))
        to_megatron(tmp_path / size / "hf", tmp_path / size / "checkpoints")
        to_hf(tmp_path / size / "checkpoints", tmp_path / size / "back")
        (tmp_path / size / "back" / "tokenizer.json").unlink()  # it is not a real tokenizer
        configs.append(tiny_config(tmp_path / size, model={**model.model_dump(), "rope_scaling": None}))
    tokens = np.random.default_rng(0).integers(0, 253, 100).astype(np.int32)
    (found,) = run_ranks(_logits, 1, configs, tokens)
    for config, logits in zip(configs, found, strict=True):
        reference = transformers.LlamaForCausalLM.from_pretrained(
            Path(config.run_dir) / "back", dtype=torch.float32
        )
        with torch.no_grad():
            expected = reference(torch.from_numpy(tokens).long()[None]).logits[0].numpy()
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(logits[:, :253], expected, atol=1e-4, rtol=0)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Another RoPE, a language model for a reward run and DPO without a reference are refused early."""
    model = tiny_config().model
    root = tmp_path / "checkpoints"
    to_megatron(write_hf(tmp_path / "hf", model, weights_of(model)), root)
    step = manifest.step_directory(root, 0)
    state = manifest.read_manifest(step)["state"]
    for config, message in (
        (tiny_config(tmp_path, model={"rope_theta": 500.0}), "model.rope_theta: 500.0"),
        (tiny_config(tmp_path, stage="reward"), "stage=reward, and the weights are a language model's"),
        (
            tiny_config(tmp_path, stage="dpo", dpo={"reference": "frozen"}),
            "the reference needs model.init_from",
        ),
    ):
        with pytest.raises(ValueError, match=f"step-00000000 cannot start this run:\n  .*{message}"):
            check_weights(step, state, config)
    check_weights(step, state, tiny_config(tmp_path))


def test_a_missing_step_is_refused(tmp_path: Path) -> None:
    model = shaped_like("8b")
    root = to_megatron(write_hf(tmp_path / "hf", model, weights_of(model)), tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="has no step 7; it has 0"):
        convert(ToHuggingFace(str(root), str(tmp_path / "x"), step=7), workers=1, report=print)
    with pytest.raises(ValueError, match="holds no published checkpoint"):
        convert(ToHuggingFace(str(tmp_path / "hf"), str(tmp_path / "x")), workers=1, report=print)
