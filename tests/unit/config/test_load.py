"""Configs inherit from a base and take overrides. All errors are reported at once, with key and remedy."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_post.config.layout import pack_multiple, segment_multiple, world_errors
from megatron_post.config.load import ConfigError, json_schema, load_config, to_yaml
from megatron_post.config.schema import Config
from tests.tiny import tiny_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
BASE = """
run_dir: runs/x
model: {preset: tiny}
tokenizer: {path: somewhere}
data: {store: store, pack_length: 512}
optimizer: {lr: 1.0e-4, betas_typo: 1}
train: {steps: 10, global_batch: 4}
"""


def _write(directory: Path, name: str, text: str) -> Path:
    (directory / name).write_text(text)
    return directory / name


def test_inheritance_and_overrides(tmp_path: Path) -> None:
    """A child replaces values of its base, and an override those of the child. Mappings are merged by key."""
    _write(tmp_path, "base.yaml", BASE.replace(", betas_typo: 1", ", min_lr: 1.0e-6"))
    child = _write(tmp_path, "child.yaml", "base: base.yaml\noptimizer: {lr: 2.0e-4}\n")
    config = load_config(child, ["train.steps=7", "parallel.tensor=2"])
    assert (config.optimizer.lr, config.optimizer.min_lr) == (2e-4, 1e-6)
    assert (config.train.steps, config.train.global_batch, config.parallel.tensor) == (7, 4, 2)
    again = load_config(_write(tmp_path, "resolved.yaml", to_yaml(config)))
    assert again == config


def test_all_field_errors_at_once(tmp_path: Path) -> None:
    path = _write(tmp_path, "bad.yaml", BASE)
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.steps=-1", "precision.fp8=int4"])
    message = str(error.value)
    assert "3 error(s)" in message
    assert "optimizer.betas_typo: unknown key (value 1)" in message
    assert "train.steps" in message and "-1" in message and "'int4'" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensor=3"], "num_attention_heads=8 is not a multiple of parallel.tensor=3"),
        (["parallel.tensor=8"], "num_key_value_heads=4 is not a multiple of parallel.tensor=8"),
        (["model.hidden_size=72"], "gives heads of 9, and rotary embeddings need an even number"),
        (["parallel.pipeline=3"], "model.num_layers=4 is not a multiple of parallel.pipeline=3"),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=4"], "virtual_pipeline=4 = 8"),
        (["parallel.virtual_pipeline=2"], "needs parallel.pipeline > 1"),
        (["parallel.context=3"], "data.pack_length=512 is not a multiple of 6"),
        (["parallel.sequence=true"], "parallel.sequence=true needs parallel.tensor > 1"),
        (["precision.fp8=delayed", "precision.dtype=fp32"], "needs precision.dtype=bf16"),
        (
            ["precision.fp8=blockwise", "data.pack_length=500"],
            "data.pack_length=500 is not a multiple of 128",
        ),
        (["model.preset=llama5"], "preset 'llama5' is unknown; choose one of tiny, llama3_8b"),
        (["steps"], "overrides must have the form key=value: steps"),
    ],
)
def test_impossible_layouts(tmp_path: Path, overrides: list[str], expected: str) -> None:
    path = _write(tmp_path, "base.yaml", BASE.replace(", betas_typo: 1", ""))
    with pytest.raises(ConfigError, match=r"error|override") as error:
        load_config(path, overrides)
    assert expected in str(error.value)


def test_layout_errors_come_together(tmp_path: Path) -> None:
    path = _write(tmp_path, "base.yaml", BASE.replace(", betas_typo: 1", ""))
    with pytest.raises(ConfigError, match=r"5 error\(s\)"):  # heads, groups, ffn, layers, pack length
        load_config(path, ["parallel.tensor=3", "parallel.pipeline=3", "parallel.context=5"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "top level must be a mapping"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: bad.yaml", "inherits from itself"),
        ("x: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(_write(tmp_path, "bad.yaml", text))


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("nowhere.yaml")


def test_world() -> None:
    """Errors of ranks, batch and FP8 on this machine are reported together."""
    config = tiny_config(parallel={"tensor": 2}, precision={"dtype": "bf16", "fp8": "delayed"})
    errors = world_errors(config, world_size=6, has_gpu=False, has_transformer_engine=False)
    assert errors == [
        "train.global_batch=4 is not a multiple of the 3 data-parallel ranks of 6 ranks",
        "precision.fp8=delayed needs a GPU; set precision.fp8=null",
    ]
    (error,) = world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=False)
    assert "needs Transformer Engine" in error
    assert world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=True) == []
    (error,) = world_errors(
        tiny_config(parallel={"tensor": 2}), world_size=3, has_gpu=True, has_transformer_engine=True
    )
    assert "3 ranks are not a multiple of tensor x pipeline x context = 2" in error
    interleaved = tiny_config(parallel={"pipeline": 4, "virtual_pipeline": 1}, train={"global_batch": 6})
    assert world_errors(interleaved, world_size=4, has_gpu=True, has_transformer_engine=True) == []
    interleaved = tiny_config(parallel={"pipeline": 2, "virtual_pipeline": 2}, train={"global_batch": 3})
    (error,) = world_errors(interleaved, world_size=2, has_gpu=True, has_transformer_engine=True)
    assert "3 microbatches per data-parallel rank are not a multiple of parallel.pipeline=2" in error


def test_widths_of_heads_on_a_gpu() -> None:
    """A hidden size of 64 with 16 and with 8 heads gives widths of 4 and 8.

    A CPU accepts both, and each attention of a GPU has its own limit.
    """
    four, eight = ({"num_attention_heads": heads, "num_key_value_heads": 2} for heads in (16, 8))
    gpu: dict = {"world_size": 4, "has_gpu": True}
    bf16 = {"dtype": "bf16"}
    for model in (four, eight):
        config = tiny_config(model=model)
        assert world_errors(config, world_size=4, has_gpu=False, has_transformer_engine=False) == []
        for precision, has_transformer_engine in (({"dtype": "fp32"}, True), (bf16, False)):
            config = tiny_config(model=model, precision=precision)
            (error,) = world_errors(config, has_transformer_engine=has_transformer_engine, **gpu)
            assert "on a GPU FlexAttention needs at least 16" in error
    (error,) = world_errors(tiny_config(model=four, precision=bf16), has_transformer_engine=True, **gpu)
    assert "heads of 4, and on a GPU Transformer Engine's attention needs a multiple of 8 up to 256" in error
    widest = {"hidden_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
    for model in (eight, widest):
        assert (
            world_errors(tiny_config(model=model, precision=bf16), has_transformer_engine=True, **gpu) == []
        )
    wider = tiny_config(model={**widest, "hidden_size": 528}, precision=bf16)
    (error,) = world_errors(wider, has_transformer_engine=True, **gpu)
    assert (
        "heads of 264, and on a GPU Transformer Engine's attention needs a multiple of 8 up to 256" in error
    )


def test_recomputed_norms_need_transformer_engine() -> None:
    """Without it megatron-core fails in the first forward pass. Without selected modules it works."""
    for modules, remedy in (
        (["layernorm"], "set recompute.mode=none and recompute.modules=[core_attn]"),
        (["core_attn", "layernorm", "mlp"], r"set recompute.modules=[core_attn,mlp]"),
    ):
        config = tiny_config(recompute={"mode": "selective", "modules": modules})
        (error,) = world_errors(config, world_size=4, has_gpu=False, has_transformer_engine=False)
        assert error.endswith(remedy) and "needs Transformer Engine" in error
        assert world_errors(config, world_size=4, has_gpu=True, has_transformer_engine=True) == []
    config = tiny_config(recompute={"mode": "full"})
    assert world_errors(config, world_size=4, has_gpu=False, has_transformer_engine=False) == []


def test_multiples() -> None:
    """With CP 4, TP 2 with SP, and FP8 delayed, segments need 2 x 4 and packs lcm(8, 4 x 2 x 16) = 128."""
    config = tiny_config(
        model={"num_key_value_heads": 4},
        parallel={"context": 4, "tensor": 2, "sequence": True},
        precision={"dtype": "bf16", "fp8": "delayed"},
    )
    assert (segment_multiple(config), pack_multiple(config)) == (8, 128)
    assert (segment_multiple(tiny_config()), pack_multiple(tiny_config())) == (1, 1)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        tiny_config().train.steps = 3


def test_405b_is_the_report_s() -> None:
    config = load_config(CONFIGS / "llama3_405b" / "sft.yaml")
    assert config.optimizer.lr == 1e-5 and 8500 <= config.train.steps <= 9000
    assert config.data.pack_length == 131072 and config.precision.fp8 is not None
    assert sum(source.weight or 0 for source in config.data.sources) == pytest.approx(100)
    assert world_errors(config, world_size=1024, has_gpu=True, has_transformer_engine=True) == []


# Clusters and recipes have other schemas, and a round completes the files of its stages
# (tests/e2e/test_round.py).
RUNS = [
    path
    for path in sorted(CONFIGS.glob("*/[!b]*.yaml"))
    if path.parent.name not in ("clusters", "synthesis", "curation") and not path.name.startswith("round")
]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_shipped_configs_load(path: Path) -> None:
    load_config(path)


def test_schema_describes_the_keys() -> None:
    schema = json.loads(json_schema(Config))
    assert schema["additionalProperties"] is False
    assert {"model", "parallel", "train"} <= schema["properties"].keys()
