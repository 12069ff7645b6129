"""Packs in this trainer equal padded rows in `transformers`, with the same weights."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import export_hf, gathered_tensors
from megatron_post.data.template import TokenRole
from megatron_post.data.tokenizer import train_small_tokenizer
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.stages.sft import SFT
from megatron_post.train.step import Stepper
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs

transformers = pytest.importorskip("transformers")


def _random_hf(directory: Path, config: Config, *, shards: bool) -> Any:
    torch.manual_seed(5)
    values = to_hf_config(config.model, dtype="float32", bos_id=1, eos_ids=[2], pad_id=None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, "initializer_range": 0.1}))
    for parameter in model.parameters():  # norms are random too, so that a forgotten norm weight is noticed
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(directory, max_shard_size="60KB" if shards else "5GB")
    return model


def _logits(config: Config, tokens: np.ndarray) -> np.ndarray:
    with parallel_run(config.parallel, seed=1) as topology:
        (model,) = build_model(config, topology)
        load_weights([model], open_weights(config.model, seed=0), config.model)
        stepper = Stepper([model], SFT(["body"]), topology, portable=True)
        packed = stepper.prepare(_one_segment(tokens)).packed
        ids = torch.from_numpy(tokens).long()[None]
        with torch.no_grad():
            logits = model(ids, None, None, labels=None, packed_seq_params=packed)
        return logits[:, 0].numpy()


def _one_segment(tokens: np.ndarray) -> Any:
    from dataclasses import replace

    pack = tiny_packs(1)[0]
    return replace(
        pack,
        tokens=tokens,
        roles=np.full(len(tokens), 3, np.uint8),
        cu_seqlens=np.array([0, len(tokens)], np.int32),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tmp_path: Path, tied: bool) -> None:
    """The logits are equal, also at positions beyond the original context.

    The model is a random Llama with 3.1 RoPE scaling, grouped queries and weights in many shards.
    """
    config = tiny_config(model={"init_from": str(tmp_path / "hf"), "tie_word_embeddings": tied})
    reference = _random_hf(tmp_path / "hf", config, shards=not tied)
    tokens = np.random.default_rng(0).integers(0, 250, 200).astype(np.int32)
    (logits,) = run_ranks(_logits, 1, config, tokens)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()[None]).logits[0].numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits[:, :250], expected, atol=1e-4, rtol=0)


def _loss_and_gradients(config: Config) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology)
        load_weights(models, open_weights(config.model, seed=0), config.model)
        metrics = Stepper(models, SFT(config.loss.trained_roles), topology, portable=True)(tiny_packs())
        gradients = gathered_tensors(models, config.model, value_of=lambda p: p.grad)
        return metrics, {name: g.numpy() for name, g in gradients}


def test_packed_equals_padded(tmp_path: Path) -> None:
    """Loss and gradients over packs equal those of `transformers` over the same dialogs as padded rows.

    The loss is written out: -log p of each trained token given its prefix.
    """
    config = tiny_config(model={"init_from": str(tmp_path)})
    reference = _random_hf(tmp_path, config, shards=False)
    ((metrics, gradients),) = run_ranks(_loss_and_gradients, 1, config)
    loss, count = _padded_loss(reference)
    loss.backward()
    assert metrics["loss_count"] == count
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        error = np.linalg.norm(gradients[name] - parameter.grad.numpy())
        assert error <= 1e-4 * np.linalg.norm(parameter.grad.numpy()), name


def _padded_loss(model: Any) -> tuple[torch.Tensor, int]:
    rows = []
    for pack in tiny_packs():
        for start, end in pairwise(pack.cu_seqlens):
            real = pack.roles[start:end] != TokenRole.PADDING
            if real.any():
                rows.append((pack.tokens[start:end][real], pack.roles[start:end][real]))
    longest = max(len(tokens) for tokens, _ in rows)
    ids, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for i, (tokens, _) in enumerate(rows):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.from_numpy(tokens), 1
    logps = model(ids, attention_mask=mask).logits.log_softmax(-1)
    terms = [
        -logps[i, t - 1, tokens[t]]
        for i, (tokens, roles) in enumerate(rows)
        for t in range(1, len(tokens))
        if roles[t] in (TokenRole.BODY, TokenRole.TERMINATOR)
    ]
    return torch.stack(terms).sum(), len(terms)


def _export(config: Config, target: Path) -> None:
    tokenizer = train_small_tokenizer(["some text 123"], 300)
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology)
        load_weights(models, open_weights(config.model, seed=0), config.model)
        export_hf(models, config.model, tokenizer, topology, target)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]
)
def test_round_trip_is_bit_exact(tmp_path: Path, parallel: dict[str, int], tied: bool) -> None:
    """HF -> here -> HF keeps names and bytes, and `transformers` loads the result without a warning."""
    model = {"init_from": str(tmp_path / "hf"), "tie_word_embeddings": tied}
    config = tiny_config(model=model, parallel=parallel)
    _random_hf(tmp_path / "hf", config, shards=False)
    ranks = config.parallel.model_size
    run_ranks(_export, ranks, config, tmp_path / "back")
    before = load_file(tmp_path / "hf" / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.model.norm.weight, before["model.norm.weight"])
    if (index := tmp_path / "back" / "model.safetensors.index.json").exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(
            t.nbytes for t in after.values()
        )
