"""Overrides on a command line and references to other values are applied, or refused with a remedy."""

import time
from typing import Any

import pytest

from megatron_post.config.load import load_config, to_yaml
from megatron_post.config.overrides import merged, with_overrides
from megatron_post.config.references import escaped, resolved
from megatron_post.config.yaml_text import read_yaml
from tests.tiny import tiny_config

TREE = {
    "run_dir": "runs/x",
    "data": {
        "store": "${run_dir}/store",
        "sources": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}],
        "eval_sources": [],
    },
    "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
    "model": {"rope_scaling": None},
}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.sources.0.path=x", "data.sources", [{"name": "a", "path": "x"}, {"name": "b", "path": "b"}]),
        ("data.sources.1={path: x}", "data.sources.1", {"name": "b", "path": "x"}),
        ("data.sources=[]", "data.sources", []),
        ("run_dir=runs/exp #3", "run_dir", "runs/exp #3"),
        ("run_dir=a=b", "run_dir", "a=b"),
        ("run_dir=https://host/x: y", "run_dir", "https://host/x: y"),
        ("run_dir='5'", "run_dir", "5"),
        ('run_dir=""', "run_dir", ""),
        ("optimizer={lr: 1}", "optimizer", {"lr": 1, "min_lr": 1e-5}),
        ("optimizer.lr=5e-7", "optimizer.lr", 5e-7),
        ("model.rope_scaling.factor=4", "model.rope_scaling", {"factor": 4}),
        ("optimizer=null", "optimizer", None),
        ("new.section.key=1", "new", {"section": {"key": 1}}),
    ],
)  # fmt: skip
def test_an_override(override: str, key: str, value: Any) -> None:
    before = repr(TREE)
    found: Any = with_overrides(TREE, [override])
    for part in key.split("."):
        found = found[int(part) if part.isdecimal() else part]
    assert found == value
    assert repr(TREE) == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.lr"], "overrides must have the form key=value: optimizer.lr"),
        (["--optimizer.lr=1"], "--optimizer.lr=1: write optimizer.lr=1, without the hyphens"),
        (["-optimizer.lr"], "-optimizer.lr: write optimizer.lr=VALUE, without the hyphens"),
        (["run_dir="], "'run_dir=' has no value; write null for none, or '\"\"' for an empty text"),
        (["optimizer .lr=1"], "'optimizer .lr' is not a key such as"),
        (["optimizer..lr=1"], "'optimizer..lr' is not a key such as"),
        ([".lr=1"], "'.lr' is not a key such as"),
        (["data.sources[0].path=x"], "is not a key such as optimizer.lr or data.sources.0.path"),
        (["=1"], "'' is not a key such as"),
        ([".".join("a" * 5000) + "=1"], "is not a key such as"),
        (["data.sources.2.path=x"], "data.sources is a list with items 0 to 1, and '2' is none of them"),
        (["data.sources.math.path=x"], "is a list with items 0 to 1, and 'math' is none of them"),
        (["data.sources.-1.path=x"], "and '-1' is none of them"),
        (["data.sources.00.path=x"], "and '00' is none of them"),
        ([f"data.sources.{'9' * 5000}.path=x"], "is none of them"),
        (["data.eval_sources.0.path=x"], "data.eval_sources is a list without items, and '0'"),
        (["run_dir.x=1"], "run_dir.x: run_dir is 'runs/x', and holds no keys"),
        (["optimizer.lr=1", "optimizer.lr=2"], "optimizer.lr is given twice, as 1 and as 2; leave one out"),
        (["seed=1", "seed=true"], "seed is given twice, as 1 and as True"),
        (["data.sources.0.path=x", "data.sources=[]"], "data.sources and data.sources.0.path, which is"),
        (["run_dir=[a"], "run_dir=[a: the value is not valid YAML: line 1, column 3"),
        (["run_dir=[red]x"], "put a text that begins with [ in quotes"),
    ],
)  # fmt: skip
def test_overrides_that_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        with_overrides(TREE, overrides)
    assert expected in str(error.value) and len(str(error.value)) < 500


def test_an_override_given_twice_with_one_value_is_no_contradiction() -> None:
    assert with_overrides(TREE, ["seed=1", "seed=1"])["seed"] == 1


def test_all_errors_of_overrides_come_together() -> None:
    with pytest.raises(ValueError, match=r"(?s)key=value: a\n.*no value.*\ndata.sources.7.path: ") as error:
        with_overrides(TREE, ["a", "b=", "data.sources.7.path=x"])
    assert len(str(error.value).splitlines()) == 3


def test_merging() -> None:
    """Mappings are merged key by key. A list, a value and null replace the old value."""
    under = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "f": 1}
    assert merged(under, {"a": {"c": [3]}, "d": None, "f": {"g": 2}}) == {
        "a": {"b": 1, "c": [3]},
        "d": None,
        "f": {"g": 2},
    }


def test_references() -> None:
    """A reference that is the whole value keeps the type. Inside a text the value is written as in YAML."""
    tree = {"a": 1e-5, "b": "${a}", "c": "x ${a} ${d.1} $${a} $a", "d": [True, "${b}"], "e": {"f": "${d.0}"}}
    assert resolved(tree) == {
        "a": 1e-5,
        "b": 1e-5,
        "c": "x 1e-05 1e-05 ${a} $a",
        "d": [True, 1e-5],
        "e": {"f": True},
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${oc.env:HOME}", "k: ${oc.env:HOME} names no key of this config; environment variables"),
        ("${env:HOME}", "environment variables and functions are not read"),
        ("${oc.decode:'${a}'}", "environment variables and functions are not read"),
        ("${.a}", "names no key of this config"),
        ("${}", "names no key of this config"),
        ("${a", "${a names no key of this config"),
        ("${b}", "${b} names no key of this config"),
        ("${list.5}", "${list.5} names no key of this config"),
        ("${a.b}", "${a.b} names no key of this config"),
        ("${list}", "${list} is not a single value"),
        ("x${nothing}", "${nothing} is null, which cannot be a part of a text"),
        ("${k}", "references form a cycle or are nested too deeply: k -> k"),
    ],
)  # fmt: skip
def test_references_that_are_refused(value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "s3cret")
    with pytest.raises(ValueError, match=r"\S") as error:
        resolved({"k": value, "a": 1, "list": [1], "nothing": None})
    assert expected in str(error.value) and "s3cret" not in str(error.value)


def test_references_cannot_fill_the_memory() -> None:
    """Each text is ten times the previous one, so the twelfth would have 10^12 characters.

    A chain of 1,000 references is refused too.
    """
    tree = {"a0": "x" * 10} | {f"a{i}": f"${{a{i - 1}}}" * 10 for i in range(1, 12)}
    began = time.monotonic()
    with pytest.raises(ValueError, match="references insert more than 1,048,576 characters in total"):
        resolved(tree)
    with pytest.raises(ValueError, match="references form a cycle or are nested too deeply"):
        resolved({"a0": "x"} | {f"a{i}": f"${{a{i - 1}}}" for i in reversed(range(1, 1000))})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["${a}", "$${a}", "$$${a}", "${", "$", "$$", "a ${b} $${c}"])
def test_a_resolved_config_is_loaded_as_it_was(text: str, tmp_path: Any) -> None:
    assert resolved({"x": [escaped(text)]}) == {"x": [text]}
    config = tiny_config(run_dir=escaped(f"runs/{text}"))
    assert config.run_dir == f"runs/{text}"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert read_yaml(to_yaml(config))["stage"] == "sft"
