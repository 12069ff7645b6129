"""Values keep the type in which they are written, and no value of any file causes a traceback."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_post.config.chain import Chain, load_chain
from megatron_post.config.load import ConfigError, load_config, load_section, parse, read_tree
from megatron_post.config.schema import Config
from megatron_post.config.section import MOST
from megatron_post.config.validation_errors import _inside, _members
from megatron_post.config.yaml_text import write_yaml
from megatron_post.curation.rules import Rules, load_rules
from megatron_post.curation.settings import Curation
from megatron_post.inference.generate import Generate
from megatron_post.launch.cluster import Cluster, load_cluster
from megatron_post.rounds.merge_settings import MethodMerge, load_merge
from megatron_post.rounds.select_settings import Select
from megatron_post.rounds.settings import RoundSettings, load_round

ROOT = Path(__file__).resolve().parents[3]
FILES: tuple[type[BaseModel], ...] = (
    Config,
    RoundSettings,
    Chain,
    Cluster,
    Generate,
    Select,
    MethodMerge,
    Rules,
    Curation,
)
BASE = """
run_dir: runs/x
model: {preset: tiny}
tokenizer: {path: somewhere}
data: {store: store, pack_length: 512, sources: [{name: math, path: math.jsonl}]}
optimizer: {lr: 1.0e-4}
train: {steps: 10, global_batch: 4}
"""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=true", "optimizer.lr: Input should be a number (got True)"),
        ("optimizer.lr='1'", "Input should be a number in decimal digits; quotes, a leading 0, `:` and"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number (got inf)"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number (got nan)"),
        ("optimizer.lr=inf", "optimizer.lr: Input should be a number in decimal digits"),
        ("optimizer.lr=1e99", "optimizer.lr: Input should be less than or equal to 1000000000000"),
        ("optimizer.lr=1e999", "optimizer.lr: Input should be a finite number"),
        ("train.steps=true", "train.steps: Input should be a whole number (got True)"),
        ("train.steps=1.0", "train.steps: Input should be a whole number (got 1.0)"),
        ("train.steps=0777", "train.steps: Input should be a whole number in decimal digits"),
        ("train.steps=0x10", "(got '0x10')"),
        ("train.steps=1:30", "(got '1:30')"),
        ("train.steps=1_000", "(got '1_000')"),
        ("train.steps=1e3", "train.steps: Input should be a whole number (got 1000.0)"),
        (f"train.steps={2**80}", "train.steps: Input should be less than or equal to 2147483647"),
        (f"train.steps={'9' * 5000}", "train.steps: Input should be a whole number"),
        ("train.steps=-1", "train.steps: Input should be greater than 0 (got -1)"),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("train.export_hf=yes", "train.export_hf: Input should be true or false (got 'yes')"),
        ("train.export_hf=1", "train.export_hf: Input should be true or false (got 1)"),
        ("run_dir=5", "run_dir: Input should be text; put it in quotes (got 5)"),
        ("run_dir=''", "run_dir: '' is blank; where there is none, leave the key out or write null"),
        ("run_dir='  '", "run_dir: '  ' is blank"),
        ("run_dir=' x'", "run_dir: ' x' begins or ends with a blank"),
        ("run_dir=~/x", "run_dir: '~/x' begins with ~, which only a shell expands"),
        ('run_dir="a\\0b"', "run_dir: 'a\\x00b' holds a newline or another control character"),
        ('data.sources.0.name="a\\nb"', "data.sources.0.name: 'a\\nb' holds a newline"),
        (f"run_dir={'x' * 5000}", "run_dir: String should have at most 4096 characters"),
        ("data.sources=math.jsonl", "data.sources: Input should be a list (got 'math.jsonl')"),
        ("data.sources={name: x}", "data.sources: Input should be a list (got {'name': 'x'})"),
        ("data=5", "data: Input should be a mapping of keys (got 5)"),
        ("optimizer=null", "optimizer: Input should be a mapping of keys (got None)"),
        ("model.preset=[a]", "model: preset ['a'] is unknown"),
        ("model.preset=tinny", "(did you mean 'tiny'?)"),
        (
            "stage=sfft",
            "Input should be 'sft' or 'reward' or 'step_reward' or 'dpo' or 'pretrain' (did you mean 'sft'?) "
            "(got 'sfft')",
        ),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key (value 1) (did you mean 'optimizer.lr'?)"),
        ("optimizr.lr=1", "optimizr: unknown key (value {'lr': 1}) (did you mean 'optimizer'?)"),
        ("warmup_step=1", "warmup_step: unknown key (value 1) (did you mean 'optimizer.warmup_steps'?)"),
        ("data.sources.0.pth=x", "0.pth: unknown key (value 'x') (did you mean 'data.sources.0.path'?)"),
        ("data.soruces.0.path=x", "(value {'0': {'path': 'x'}}) (did you mean 'data.sources'?)"),
        ("data.eval_sources.0.path=x", "Input should be a list (got {'0': {'path': 'x'}})"),
        ("data.sources.0.columns={user: 1}", "data.sources.0.columns.user: Input should be text"),
        ("model.num_layers=100000", "model.num_layers: Input should be less than or equal to 10000"),
    ],
)  # fmt: skip
def test_invalid_values(override: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    load_config(tmp_path / "base.yaml")
    with pytest.raises(ConfigError, match=r": 1 error\(s\)\n") as error:
        load_config(tmp_path / "base.yaml", [override])
    assert expected in str(error.value)
    assert len(str(error.value)) < 1000


def _keys(kind: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(key, type with its limits) of every value in a schema. `*` is any item of a list."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            for member in _members(field.annotation):
                yield f"{above}{name}", (member, field.metadata)
                yield from _keys(member, f"{above}{name}.")
    else:
        for member in _inside(kind, "0"):
            yield f"{above}*", (member, [])
            yield from _keys(member, f"{above}*.")


@pytest.mark.parametrize("model", FILES, ids=lambda model: model.__name__)
def test_every_number_is_bounded(model: type[BaseModel]) -> None:
    """Numbers have an upper bound too, because no setting can be 2**80 or 1e300."""
    properties = list(_properties(model.model_json_schema()))
    assert properties
    for name, schema in properties:
        if schema.get("type") in ("integer", "number"):
            bounds = (
                {"minimum", "exclusiveMinimum"} & schema.keys(),
                {"maximum", "exclusiveMaximum"} & schema.keys(),
            )
            assert all(bounds), f"{name} needs a lower and an upper bound: {schema}"


@pytest.mark.parametrize("model", FILES, ids=lambda model: model.__name__)
def test_every_key_and_every_section_is_described(model: type[BaseModel]) -> None:
    """A key that holds a section, or a list of them, is described by that section."""
    schema = model.model_json_schema()
    for name, section in {model.__name__: schema, **schema.get("$defs", {})}.items():
        assert section["description"], name
        for key, value in section["properties"].items():
            assert value.get("description") or "$ref" in str(value), f"{name}.{key} has no description"


def _properties(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        yield name, schema
        for key, value in schema.items():
            if key not in ("default", "const", "enum"):
                yield from _properties(value, f"{name}.{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from _properties(value, name)


# keys that are paths or names and must be one line. Other texts may be anything
FREE_TEXTS = {
    "pattern",
    "replace",
    "system",
    "stop",
    "columns",
    "ignore",
    "command",
    "api_key_variable",
    "url",
}


@pytest.mark.parametrize("model", FILES, ids=lambda model: model.__name__)
def test_every_name_and_path_is_one_line(model: type[BaseModel]) -> None:
    """Names and paths are recognised by their largest length in the schema."""
    for key, schema in _properties(model.model_json_schema()):
        if schema.get("type") == "string" and not {"enum", "const", "maxLength", "minLength"} & schema.keys():
            assert FREE_TEXTS & set(key.split(".")), f"{key} should be a Name or a Line"


def test_unknown_keys_of_every_kind_of_file(tmp_path: Path) -> None:
    """They are refused at any depth, with a suggestion, and no name of a union member is in the key."""
    cases: list[tuple[type[BaseModel], dict[str, Any], str, str]] = [
        (Cluster, {"partiton": "x"}, "partiton", "partition"),
        (Cluster, {"container": {"imag": "x"}}, "container.imag", "container.image"),
        (Chain, {"steps": [{"comand": ["x"]}]}, "steps.0.comand", "steps.0.command"),
        (Generate, {"sampling": {"temprature": 1}}, "sampling.temprature", "sampling.temperature"),
        (Generate, {"backend": {"kind": "vllm", "memry_share": 2}}, "backend.memry_share", "memory_share"),
        (Select, {"verifier": {"kind": "exact", "patern": "x"}}, "verifier.patern", "verifier.pattern"),
        (Rules, {"rules": [{"patern": "x"}]}, "rules.0.patern", "rules.0.pattern"),
        (MethodMerge, {"models": [{"wieght": 1}]}, "models.0.wieght", "models.0.weight"),
        (RoundSettings, {"start": {"polcy": "x"}}, "start.polcy", "start.policy"),
    ]  # fmt: skip
    for model, values, key, meant in cases:
        with pytest.raises(ConfigError) as error:
            parse(model, values, origin="file")
        assert f"- {key}: unknown key (value " in str(error.value)
        assert f"{meant}'?)" in str(error.value)


def test_a_section_of_several_forms_must_name_one() -> None:
    with pytest.raises(ConfigError, match=r"- backend\.kind: missing"):
        parse(Generate, {"backend": {"url": "http://localhost"}}, origin="file")


def test_many_errors_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE + "".join(f"key{i}: 1\n" for i in range(5000)))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"base.yaml: 5000 error\(s\)") as error:
        load_config(path)
    assert str(error.value).endswith("  - and 4950 more") and len(str(error.value).splitlines()) == 52
    assert time.monotonic() - began < 30


NUMBERS = st.sampled_from(
    [0, 1, -1, 2**31, 2**63, 2**80, -(2**80), 0.5, 1e300, float("inf"), float("nan"), -0.0]
)
TEXTS = st.sampled_from(
    ["", " ", "\0", "a\nb", "x" * 5000, "${run_dir}", "${oc.env:HOME}", "${", "$${x}", "yes", "0777", "1:30",
     "null", "tiny", "sft", "dpo", "[", "{", "a: b", "a #3", "\x1b[31m", "[red]", "\u202e", "../x", "/", "~",
     "é", "vllm", "exact"]
) | st.text(max_size=20)  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
LOADERS: dict[str, Callable[[Path, list[str]], Any]] = {
    "Config": load_config,
    "RoundSettings": load_round,
    "Cluster": lambda path, _: load_cluster(path),
    "Chain": lambda path, _: load_chain(path),
    "Rules": lambda path, _: load_rules(path),
    "MethodMerge": lambda path, _: load_merge(path, "ties"),
    "Generate": lambda path, overrides: load_section(Generate, path, overrides),
    "Select": lambda path, overrides: load_section(Select, path, overrides),
    "Curation": lambda path, overrides: load_section(Curation, path, overrides),
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "Config": read_tree(ROOT / "configs/llama3_405b/dpo.yaml"),
    "RoundSettings": read_tree(ROOT / "configs/tiny/round.yaml"),
    "Cluster": read_tree(ROOT / "configs/clusters/h100.yaml"),
    "Chain": {"run_dir": "r", "steps": [{"name": "a", "command": ["train", "x.yaml"], "after": []}]},
    "Rules": read_tree(ROOT / "configs/curation/cleaning.yaml"),
    "MethodMerge": {"models": [{"model": "a"}, {"model": "b"}], "base_model": "c"},
    "Generate": {
        "model": "a",
        "prompts": "b",
        "backend": {"kind": "transformers"},
        "sampling": {"samples": 2},
    },
    "Select": {"prompts": "a", "samples": [{"responses": "b", "scores": "c"}]},
    "Curation": {"run": "a", "sources": [{"name": "b", "path": "c"}], "steps": [{"kind": "repeats"}]},
}
# the config of a run inside a chain is that of a run
SCHEMAS = {model.__name__: [key for key, _ in _keys(model) if ".like." not in key] for model in FILES}


@st.composite
def _mutated(draw: st.DrawFn) -> tuple[str, dict[str, Any], list[str]]:
    """A kind of file, an example of it with junk in one to three places, and overrides with junk."""
    kind = draw(st.sampled_from(sorted(LOADERS)))
    tree, overrides = EXAMPLES[kind], []
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(SCHEMAS[kind])).replace("*", draw(st.sampled_from(["0", "1", "x"])))
        tree = _put(tree, key.split("."), draw(JUNK))
    if kind in ("Config", "RoundSettings", "Generate", "Select"):
        for _ in range(draw(st.integers(0, 2))):
            key = draw(st.sampled_from(SCHEMAS[kind]) | st.text(max_size=8)).replace(
                "*", draw(st.sampled_from("019x"))
            )
            overrides.append(f"{draw(st.sampled_from(['', '', '', '--']))}{key}={draw(TEXTS)}")
    return kind, tree, overrides


def _put(tree: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    if isinstance(tree, list):
        number = min(int(path[0]), len(tree) - 1) if path[0].isdecimal() and tree else 0
        return [*tree[:number], _put(tree[number] if tree else None, path[1:], value), *tree[number + 1 :]]
    keys = tree if isinstance(tree, dict) else {}
    return {**keys, path[0]: _put(keys.get(path[0]), path[1:], value)}


def test_no_file_and_no_override_ends_in_a_traceback(tmp_path: Path) -> None:
    """A file with junk of any kind is loaded or refused by one `ConfigError`, within a short time."""
    inputs, refused, longest = 0, 0, 0.0

    @settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(_mutated() | st.tuples(st.sampled_from(sorted(LOADERS)), st.text() | st.binary(), st.just([])))
    def load(case: tuple[str, Any, list[str]]) -> None:
        nonlocal inputs, refused, longest
        kind, content, overrides = case
        path = tmp_path / "file.yaml"
        if isinstance(content, dict):
            content = write_yaml(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        inputs, began = inputs + 1, time.monotonic()
        try:
            LOADERS[kind](path, overrides)
        except ConfigError as error:
            refused += 1
            assert str(error)
        longest = max(longest, time.monotonic() - began)

    load()
    print(f"{inputs} inputs, {refused} refused, 0 tracebacks, the slowest took {longest:.2f} s")
    assert inputs >= 2000 and refused > inputs / 2 and longest < 10
    assert MOST < 2**63
