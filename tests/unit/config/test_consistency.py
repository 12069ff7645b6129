"""Settings without effect and contradictory settings are refused with their key and a remedy."""

from pathlib import Path
from typing import Any

import pytest

from megatron_post.config.chain import Chain
from megatron_post.config.consistency import NEEDS
from megatron_post.config.load import ConfigError, load_config, parse, to_yaml
from megatron_post.config.stages import STAGES
from megatron_post.inference.request import Sampling
from megatron_post.launch.cluster import Cluster
from megatron_post.rounds.merge_settings import MethodMerge
from megatron_post.rounds.select_settings import Select
from megatron_post.rounds.settings import RoundSettings
from tests.tiny import tiny_config

SOURCES = [{"name": "math", "path": "math.jsonl"}, {"name": "chat", "path": "chat.jsonl"}]


@pytest.mark.parametrize(
    ("stage", "sections", "expected"),
    [
        (
            "dpo",
            {"dpo": {"label_smoothing": 0.1}},
            "dpo.label_smoothing=0.1 has no effect with dpo.loss=sigmoid: set dpo.loss to robust, or leave "
            "dpo.label_smoothing at 0.0",
        ),
        ("dpo", {"dpo": {"margin": 0.7, "loss": "ipo"}}, "dpo.margin=0.7 has no effect with dpo.loss=ipo"),
        ("dpo", {"dpo": {"reference": "frozen", "loss": "simpo"}}, "dpo.reference=frozen has no effect with"),
        (
            "dpo",
            {"dpo": {"nll_weight": 0, "nll_normalization": "per_sequence"}},
            "dpo.nll_normalization=per_sequence has no effect with dpo.nll_weight=0.0: set dpo.nll_weight "
            "above 0",
        ),
        ("dpo", {"loss": {"trained_roles": ["body"]}}, "loss.trained_roles=[body] has no effect with stage"),
        ("dpo", {"data": {"train_on": "last_turn"}}, "data.train_on=last_turn has no effect with stage=dpo"),
        (
            "dpo",
            {"dpo": {"layout": "isolated", "trained_roles": ["header", "body"]}},
            "dpo.trained_roles=[header,body] trains tokens of the prompt, and dpo.layout=isolated has the",
        ),
        ("sft", {"dpo": {"layout": "isolated"}}, "dpo.layout=isolated has no effect with stage=sft: set"),
        ("sft", {"dpo": {"margin": 0.7}}, "dpo.margin=0.7 has no effect with stage=sft: set stage to dpo"),
        ("sft", {"reward": {"layout": "separate"}}, "reward.layout=separate has no effect with stage=sft"),
        (
            "sft",
            {"data": {"preferences": {"min_rating": None}}},
            "data.preferences.min_rating=null has no effect with stage=sft: set stage to reward or dpo",
        ),
        ("reward", {"loss": {"impl": "unfused"}}, "loss.impl=unfused has no effect with stage=reward"),
        ("step_reward", {"reward": {"layout": "separate"}}, "reward.layout=separate has no effect"),
        ("reward", {"data": {"steps": {"neutral": "wrong"}}}, "data.steps.neutral=wrong has no effect"),
        ("sft", {"pretrain": {"attention": "pack"}}, "pretrain.attention=pack has no effect with stage=sft"),
        ("pretrain", {"data": {"reasoning": "drop"}}, "data.reasoning=drop has no effect"),
        ("pretrain", {"loss": {"trained_roles": ["body"]}}, "loss.trained_roles=[body] has no effect"),
        ("pretrain", {"data": {"overlong": "drop"}}, "data.overlong=drop has no effect"),
        (
            "sft",
            {"recompute": {"modules": ["mlp"]}},
            "recompute.modules=[mlp] has no effect with recompute.mode=none: set recompute.mode to "
            "selective, or leave recompute.modules at [core_attn]",
        ),
        (
            "dpo",
            {"data": {"sources": [SOURCES[0], SOURCES[1] | {"train_on": "last_turn"}]}},
            "data.sources.1.train_on=last_turn has no effect with stage=dpo: set stage to sft, or leave "
            "data.sources.1.train_on at null",
        ),
        ("sft", {"recompute": {"modules": ["mlp"], "mode": "full"}}, "no effect with recompute.mode=full"),
        ("sft", {"optimizer": {"min_lr": 1e-4}}, "no effect with optimizer.schedule=constant"),
        ("sft", {"train": {"max_skips": 3}}, "train.max_skips=3 has no effect with train.on_not_finite=stop"),
        ("sft", {"checkpoint": {"keep_every": 2}}, "checkpoint.keep_every=2 has no effect with"),
        (
            "sft",
            {"parallel": {"embedding_and_loss_as_layers": True}},
            "parallel.embedding_and_loss_as_layers=true has no effect with parallel.pipeline=1",
        ),
        (
            "sft",
            {"optimizer": {"schedule": "linear", "min_lr": 1e-2}},
            "optimizer.min_lr=0.01 is above optimizer.lr=0.001; lower it",
        ),
        (
            "sft",
            {"optimizer": {"moments": "bf16", "beta2": 0.999}},
            "optimizer.beta2=0.999 is lost in bf16, in which a moment times 0.999 can round to itself, so "
            "that it never falls; set optimizer.beta2 to at most 0.99609375, or optimizer.moments=fp32",
        ),
        ("sft", {"optimizer": {"moments": "bf16", "beta1": 0.997}}, "optimizer.beta1=0.997 is lost in bf16"),
        (
            "sft",
            {"optimizer": {"warmup_steps": 5}},
            "optimizer.warmup_steps=5 is longer than the run, train.steps=4; lower it",
        ),
        (
            "sft",
            {"data": {"sources": [*SOURCES, {"name": "math", "path": "other.jsonl"}]}},
            "data.sources.2.name: 'math' is also data.sources.0's; names must be unique",
        ),
        (
            "sft",
            {"model": {"rope_scaling": {"low_freq_factor": 4.0}}},
            "model.rope_scaling: low_freq_factor=4 must be below high_freq_factor=4",
        ),
        ("sft", {"loss": {"trained_roles": ["body", "body"]}}, "['body', 'body'] names an item twice"),
    ],
)  # fmt: skip
def test_refused(stage: str, sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=r"1 error\(s\)") as error:
        tiny_config(stage=stage, **sections)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        ("dpo", {"dpo": {"label_smoothing": 0.1, "loss": "robust"}}),
        ("dpo", {"dpo": {"margin": 0.7, "loss": "simpo"}}),
        ("dpo", {"dpo": {"reference": "frozen"}}),
        ("sft", {"dpo": {"margin": 0.5}, "reward": {"layout": "isolated"}}),  # their defaults
        ("sft", {"recompute": {"modules": ["mlp"], "mode": "selective"}}),
        ("sft", {"optimizer": {"schedule": "linear", "min_lr": 1e-3, "warmup_steps": 4}}),
        ("sft", {"optimizer": {"moments": "bf16", "beta2": 0.996}}),
        ("sft", {"optimizer": {"beta2": 0.999}}),
    ],
)
def test_not_refused(stage: str, sections: dict[str, Any]) -> None:
    tiny_config(stage=stage, **sections)


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.key}, {need.other}")
def test_the_table_names_keys(need: Any) -> None:
    config = tiny_config(data={"sources": SOURCES[:1], "eval_sources": SOURCES[1:]})
    for key in (need.key, need.other):
        value: Any = config
        for part in key.split("."):
            value = value[0] if part == "*" else getattr(value, part)


def test_a_saved_config_names_every_key_and_is_loaded_again(tmp_path: Path) -> None:
    for stage in STAGES:
        (tmp_path / "config.yaml").write_text(to_yaml(tiny_config(stage=stage)))
        assert load_config(tmp_path / "config.yaml") == tiny_config(stage=stage)


STEP = {"name": "train", "command": ["train", "x.yaml"]}
MODELS = [{"model": "a"}, {"model": "b"}]
SCORED = {"prompts": "p", "samples": [{"responses": "r", "scores": "s"}]}
ROUND = {
    "run_dir": "r",
    "start": {"policy": "p", "reward": "r"},
    "data": {"prompts": "p", "held_out": "h"},
    "stages": {"reward": "r", "sft": "s", "dpo": "d"},
    "average": {"weights": {"sft": 1.0, "dpo": 1.0}},
}


@pytest.mark.parametrize(
    ("model", "values", "expected"),
    [
        (Sampling, {"temperature": 0.0, "top_p": 0.9}, "top_p=0.9 has no effect with temperature=0.0"),
        (Select, SCORED | {"train_edited": True}, "train_edited=true has no effect with verifier=null: give"),
        (Select, SCORED | {"seed": 3}, "seed=3 has no effect with cleaning=null: give cleaning"),
        (
            RoundSettings,
            ROUND | {"select": {"only_correct": False}},
            "select.only_correct=false has no effect with select.verifier=null: give select.verifier",
        ),
        (MethodMerge, {"method": "linear", "models": MODELS, "seed": 3}, "seed=3: linear draws nothing"),
        (
            Cluster,
            {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "gpu_type": "h100"},
            "gpu_type=h100 has no effect with gpus_per_node=0: set gpus_per_node above 0",
        ),
        (
            Chain,
            {"run_dir": "r", "steps": [{"name": "s", "command": ["score", "x"], "like": ["y.yaml"]}]},
            "steps.0.like: it has no effect with command score, only with train",
        ),
        (
            Chain,
            {"run_dir": "r", "steps": [STEP, STEP | {"name": "s", "after": ["trian"]}]},
            "step 's' comes after 'trian', which is not a step (did you mean 'train'?)",
        ),
    ],
)  # fmt: skip
def test_other_files(model: type[Any], values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=r"1 error\(s\)") as error:
        parse(model, values, origin="file")
    assert expected in str(error.value)


def test_every_error_of_a_config_comes_at_once() -> None:
    with pytest.raises(ConfigError, match=r"3 error\(s\)"):
        tiny_config(parallel={"tensor": 4}, dpo={"margin": 0.7}, optimizer={"warmup_steps": 9})
