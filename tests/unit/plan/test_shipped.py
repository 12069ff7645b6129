"""The configs of this repository fit where their first lines say they run, and rounds name them."""

from pathlib import Path

import pytest

from megatron_post.config.load import load_config
from megatron_post.plan.estimate import make_plan
from megatron_post.plan.hardware import gpu

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GPUS = {
    "llama3_8b/sft": 8,
    "llama3_8b/reward": 8,
    "llama3_8b/dpo": 8,
    "llama3_70b/sft": 64,
    "llama3_70b/reward": 32,
    "llama3_70b/dpo": 32,
    "llama3_405b/sft": 512,
    "llama3_405b/sft_multilingual": 512,
    "llama3_405b/reward": 256,
    "llama3_405b/dpo": 256,
    "llama3_8b/step_reward": 8,
    "llama3_70b/step_reward": 32,
    "llama3_405b/step_reward": 256,
    "llama3_8b/sft_lora": 1,
    "llama3_8b/dpo_lora": 1,
    "llama3_70b/sft_lora": 8,
    "llama3_70b/dpo_lora": 8,
    "llama3_405b/sft_lora": 16,
    "llama3_405b/dpo_lora": 16,
    "llama3_8b/pretrain_code": 8,
    "llama3_8b/pretrain_code_long": 8,
    "llama3_8b/pretrain_multilingual": 8,
    "llama3_70b/pretrain_code": 64,
    "llama3_70b/pretrain_multilingual": 64,
}


def test_every_config_is_tested() -> None:
    files = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("llama3_*/*.yaml")}
    assert {name for name in files if not name.endswith(("base", "round"))} == GPUS.keys()


@pytest.mark.parametrize("name", GPUS)
def test_fits(name: str) -> None:
    plan = make_plan(load_config(CONFIGS / f"{name}.yaml"), gpus=GPUS[name], gpu=gpu("h100-80gb"))
    assert plan.shortfall <= 0
    if plan.config.stage != "pretrain":
        assert plan.config.optimizer.lr == (1e-5 if plan.config.adapter is None else 1e-4)
    if plan.config.stage == "dpo":
        assert (plan.config.dpo.beta, plan.config.dpo.nll_weight) == (0.1, 0.2)


@pytest.mark.parametrize("size", ["8b", "70b"])
def test_multilingual_experts_have_90_percent_of_other_languages(size: str) -> None:
    """Weights are shares of tokens with stage=pretrain."""
    config = load_config(CONFIGS / f"llama3_{size}/pretrain_multilingual.yaml")
    weights = {source.name: source.weight for source in config.data.sources}
    assert weights == {"multilingual": 90, "english": 10} and config.stage == "pretrain"


@pytest.mark.parametrize("size", ["8b", "70b", "405b"])
def test_rounds_name_these_configs(size: str) -> None:
    text = (CONFIGS / f"llama3_{size}" / "round.yaml").read_text()
    assert all(f"{stage}: configs/llama3_{size}/{stage}.yaml" in text for stage in ("reward", "sft", "dpo"))
