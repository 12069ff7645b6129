"""Every key of the schema has one kind, which docs/surviving.md lists."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_post.config.identity import RULES, Kind, kind_of
from megatron_post.config.settings import RunSettings, compare, flatten, schema_keys
from tests.tiny import tiny_config

PAGE = Path(__file__).resolve().parents[3] / "docs" / "surviving.md"


def test_every_key_of_the_schema_is_in_one_rule() -> None:
    """A key that is added to the schema needs a rule, and a rule needs a key that exists."""
    listed = Counter(key for rule in RULES for key in rule.keys)
    assert max(listed.values()) == 1
    schema = set(schema_keys())
    assert schema - set(listed) == set(), "classify these in megatron_post/config/identity.py"
    assert set(listed) - schema == set(), "these are no keys any more"
    counts = Counter(rule.kind for rule in RULES for _ in rule.keys)
    print(f"{len(schema)} keys: " + ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts)))


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text()
    for rule in RULES:
        kind = rule.kind if rule.otherwise == "harmless" else f"{rule.kind}, or {rule.otherwise}"
        row = f"| {kind} | {', '.join(f'`{key}`' for key in rule.keys)} | {rule.why} |"
        assert row in text, row


def test_a_config_has_the_keys_of_the_schema() -> None:
    """Entries of lists have their index in the key. A section that is null has the keys of its schema."""
    config = tiny_config(
        model={"rope_scaling": None},
        data={
            "sources": [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}],
            "prompted": {"sources": [{"source": "a", "templates": "a.yaml", "task": "t"}]},
        },
    )
    values = flatten(config)
    assert values["data.sources.1.name"] == "b" and values["model.rope_scaling.factor"] is None
    patterns = {key.replace(".0.", ".*.").replace(".1.", ".*.") for key in values}
    assert patterns == {key for key in schema_keys() if not key.startswith("data.eval_sources")}


ISSUE: dict[Kind, tuple[str, ...]] = {
    "identity": (
        "stage",
        "seed",
        "model.num_attention_heads",
        "model.num_key_value_heads",
        "model.rope_theta",
        "model.rope_scaling.factor",
        "model.rms_norm_eps",
        "model.tie_word_embeddings",
        "model.init_from",
        "data.store",
        "loss.trained_roles",
    ),
    "free": (
        "optimizer.lr",
        "optimizer.schedule",
        "optimizer.weight_decay",
        "optimizer.beta2",
        "train.steps",
        "train.global_batch",
        "parallel.tensor",
        "checkpoint.every",
    ),
    "harmless": ("run_dir", "train.log_every", "data.sources.*.path"),
}


def test_kinds_of_some_keys() -> None:
    settings = flatten(tiny_config())
    for kind, keys in ISSUE.items():
        assert {key: kind_of(key, settings) for key in keys} == dict.fromkeys(keys, kind)


@pytest.mark.parametrize(
    ("stage", "identity"),
    [
        ("sft", {"loss.trained_roles"}),
        ("reward", {"reward.layout"}),
        ("step_reward", set()),
        ("pretrain", {"pretrain.attention"}),
        ("dpo", {"dpo.beta", "dpo.layout", "dpo.reference", "dpo.trained_roles", "precision.fp8"}),
    ],
)
def test_settings_of_another_stage_refuse_nothing(stage: str, identity: set[str]) -> None:
    settings = flatten(tiny_config(stage=stage))
    keys = ["loss.trained_roles", "reward.layout", "dpo.beta", "dpo.reference", "dpo.trained_roles"]
    keys += ["dpo.layout", "precision.fp8", "pretrain.attention"]
    assert {key for key in keys if kind_of(key, settings) == "identity"} == identity


def test_what_random_weights_are_drawn_with() -> None:
    drawn = flatten(tiny_config())
    assert kind_of("model.initializer_range", drawn) == "identity"
    assert kind_of("model.initializer_range", drawn | {"model.init_from": "base"}) == "free"
    reward = flatten(tiny_config(stage="reward")) | {"model.init_from": "base"}
    assert kind_of("model.initializer_range", reward) == "identity"


def test_a_path_is_the_same_where_its_content_is() -> None:
    values = flatten(tiny_config())
    there = RunSettings(values, {"data.store": "a" * 64})
    moved = RunSettings(values | {"data.store": "/elsewhere"}, {"data.store": "a" * 64})
    assert compare(there, moved) == ([], [])
    ((change,), free) = compare(there, RunSettings(values, {"data.store": "b" * 64}))
    assert change.key == "data.store" and not free
    assert (change.before, change.after) == (
        "unused (content aaaaaaaaaaaa)",
        "unused (content bbbbbbbbbbbb)",
    )
    # without a digest the paths themselves are compared
    ((change,), _) = compare(RunSettings(values, {}), moved)
    assert (change.before, change.after) == ("unused", "/elsewhere (content aaaaaaaaaaaa)")


def test_held_out_data_may_change_and_is_named() -> None:
    values = flatten(tiny_config())
    digests = [RunSettings(values, {"data.eval_sources": letter * 64}) for letter in "ab"]
    (refused, (change,)) = compare(*digests)
    assert not refused
    assert (change.key, change.before) == ("data.eval_sources", "(content aaaaaaaaaaaa)")


def test_keys_of_another_version() -> None:
    """A key that was added later counts as its default. A removed key is reported and does not stop a run."""
    values = flatten(tiny_config())
    older = {key: value for key, value in values.items() if key != "optimizer.eps"}
    older["optimizer.momentum"] = 0.9
    (refused, (change,)) = compare(RunSettings(older, {}), RunSettings(values, {}))
    assert not refused
    assert (change.key, change.before, change.after) == ("optimizer.momentum", "0.9", "null")
    (_, changes) = compare(RunSettings(older, {}), RunSettings(values | {"optimizer.eps": 1e-6}, {}))
    assert ("optimizer.eps", "1e-08", "1e-06") in [(c.key, c.before, c.after) for c in changes]
