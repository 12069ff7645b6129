"""Five optimizer steps of LoRA and DoRA equal those of `peft`, and `peft` loads the exports."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file

from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_writer import export_hf
from megatron_post.convert.peft_writer import export_adapter, merged_weights
from megatron_post.data.pack import Pack
from megatron_post.data.tokenizer import load_tokenizer, train_small_tokenizer
from megatron_post.parallel.topology import parallel_run
from megatron_post.stages.sft import SFT
from megatron_post.train.parts import build_trainer
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
transformers = pytest.importorskip("transformers")

STEPS, ADAPTER = 5, {"rank": 4, "alpha": 8.0}
KINDS = {"lora": {}, "dora": {"kind": "dora"}, "few targets": {"targets": ["k_proj", "down_proj"]}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
}


def _config(tmp_path: Path, adapter: dict[str, Any], parallel: dict[str, Any]) -> Config:
    """A random Hugging Face model and a PEFT directory with a random B are the start of both sides."""
    train_small_tokenizer(["red green blue"] * 9 + ["system user assistant"] * 9, 300).save(tmp_path / "base")
    vocabulary = load_tokenizer(tmp_path / "base").vocab_size
    config = tiny_config(
        tmp_path / "run",
        parallel=parallel,
        model={"vocab_size": vocabulary, "init_from": str(tmp_path / "base")},
        tokenizer={"path": str(tmp_path / "base")},
        adapter={**ADAPTER, **adapter, "init_from": str(tmp_path / "start")},
        optimizer={"clip_grad": 0.5},
        train={"steps": STEPS},
    )
    values = to_hf_config(config.model, dtype="float32", bos_id=1, eos_ids=[2], pad_id=0)
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert config.adapter is not None
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.adapter.rank,
        lora_alpha=config.adapter.alpha,
        target_modules=list(config.adapter.targets),
        use_dora=config.adapter.kind == "dora",
    )
    model = peft.get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "start")
    return config


def _packs(config: Config) -> list[list[Pack]]:
    return [tiny_packs(4, seed=step, vocab_size=config.model.vocab_size) for step in range(STEPS)]


def _our_steps(config: Config, directory: Path) -> list[dict[str, float]]:
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, _ = build_trainer(config, topology)
        metrics = [trainer.step(packs) for packs in _packs(config)]
        chunks, tokenizer = unwrap_model(trainer.chunks), load_tokenizer(config.tokenizer.path)
        assert config.adapter is not None
        export_adapter(chunks, config.adapter, config.model, topology, directory / "adapter")
        export_hf(
            chunks, config.model, tokenizer, topology, directory / "hf", value_of=merged_weights(chunks)
        )
        return metrics


def _loss(model: Any, config: Config, packs: list[Pack]) -> torch.Tensor:
    """The mean loss of the trained tokens. Each segment is a row of its own."""
    total, count = torch.zeros([]), 0
    for pack in packs:
        batch = SFT(config.loss.trained_roles).collate(pack)
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            logps = model(batch.tokens[None, start:end]).logits[0].log_softmax(-1)
            chosen = logps.gather(1, batch.labels[start:end, None])[:, 0]
            total = total - chosen[batch.trained[start:end]].sum()
            count += int(batch.trained[start:end].sum())
    return total / count


def _peft_steps(config: Config, start: Path) -> tuple[Any, list[tuple[float, float]]]:
    """The model after five steps of AdamW, and (loss, gradient norm) of each step."""
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.init_from)
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    o, found = config.optimizer, []
    optimizer = torch.optim.AdamW(
        trained, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )
    for packs in _packs(config):
        loss = _loss(model, config, packs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, o.clip_grad)
        found.append((float(loss.detach()), float(norm)))
        optimizer.step()
        optimizer.zero_grad()
    return model, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_and_exports(tmp_path: Path, kind: str, layout: str) -> None:
    """A wrong scale, name, order of rows or factor exceeds the bounds of 1e-4 at once."""
    world_size, parallel = LAYOUTS[layout]
    config = _config(tmp_path, KINDS[kind], parallel)
    model, expected = _peft_steps(config, tmp_path / "start")
    metrics = run_ranks(_our_steps, world_size, config, tmp_path)[-1]
    for ours, (loss, norm) in zip(metrics, expected, strict=True):
        assert ours["loss"] == pytest.approx(loss, rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(norm, rel=1e-4)

    model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    before = load_file(tmp_path / "start" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        moved = (theirs[name] - before[name]).norm()
        assert (value - theirs[name]).norm() <= 1e-3 * moved, name

    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.init_from)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.from_numpy(np.arange(60)[None] % config.model.vocab_size)
    with torch.no_grad():
        adapted, whole, trained = (m(tokens).logits for m in (loaded, merged, model))
    assert (adapted - base_logits(config, tokens)).abs().max() > 0.1
    torch.testing.assert_close(adapted, trained, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=1e-4)


def base_logits(config: Config, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the model without an adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.init_from)
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found
