"""Bad input to each command gives status 2 and one message on stderr that names the file and the remedy."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_post import cli
from tests.unit.rounds.models import tiny_policy


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with only a model and a prompt, as the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_policy(tmp_path / "model")
    Path("prompts.jsonl").write_text('{"prompt": "1 + 1?", "answer": 2}\n')
    return tmp_path


def _message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The message of a command that ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["megatron-post", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert "Traceback" not in said
    return said


GENERATE = {"model": "model", "prompts": "prompts.jsonl", "sampling": {"samples": 2, "max_tokens": 4}}


@pytest.mark.parametrize(
    ("changes", "content", "message"),
    [
        (
            {"sampling": {"samples": 0}},
            None,
            "generate.yaml: 1 error(s)\n  - sampling.samples: Input should be",
        ),
        ({"prompts": "none.jsonl"}, None, "prompts none.jsonl does not exist (did you mean prompts.jsonl?)"),
        ({"model": "elsewhere"}, None, "elsewhere is not a directory"),
        ({}, "", "prompts prompts.jsonl: no prompt in it"),
        ({}, '{"prompt": "a"}\n{"prompt": "a"}\n', "prompts.jsonl:2: asks what line 1 asks"),
        ({}, '{"promt": "a"}\n', "max_bad_rows (now 0)"),
        ({"backend": {"kind": "server", "url": "localhost"}}, None, "backend.url: it must read http"),
        ({"sampling": {"max_tokens": 900}}, None, "max_tokens=900 take"),
    ],
)
def test_generate(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    content: str | None,
    message: str,
) -> None:
    Path("generate.yaml").write_text(yaml.safe_dump(GENERATE | changes))
    if content is not None:
        Path("prompts.jsonl").write_text(content)
    assert message in _message(capsys, monkeypatch, "generate", "generate.yaml", "--output", "samples.jsonl")
    assert not Path("samples.jsonl").exists()


def test_select(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": 1, "sample": 0, "checkpoint": "m", "seed": 1, "tokens": 1, "finish": "stop"}
    said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    Path("samples.jsonl").write_text(json.dumps(row | {"messages": said}) + "\n")
    values: dict[str, object] = {"prompts": "prompts.jsonl", "samples": [{"responses": "samples.jsonl"}]}
    exact = {"kind": "exact", "pattern": "(x)"}
    for changes, message in (
        ({}, "without scores and a verifier there is no rule for the selection"),
        ({"samples": [{"responses": "none"}], "verifier": exact}, "file none does not exist"),
        ({"samples": [{"responses": "samples.jsonl", "scores": "none"}]}, "file none does not exist"),
        ({"samples": [{"responses": "prompts.jsonl"}], "verifier": exact}, "prompts.jsonl:1: no sample"),
        ({"verifier": exact}, "none of 1 prompts has a response to train on or two to compare"),
        ({"verifier": {"kind": "command", "command": ["false"]}}, "verifier false ended with status 1"),
        ({"verifier": exact, "cleaning": "rules.yaml"}, "config file rules.yaml does not exist"),
    ):
        Path("select.yaml").write_text(yaml.safe_dump(values | changes))
        assert message in _message(capsys, monkeypatch, "select", "select.yaml", "--output", "out")
        assert not Path("out").exists()


def test_merge_and_round(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("merge.yaml").write_text(yaml.safe_dump({"models": [{"model": "model"}, {"model": "elsewhere"}]}))
    for words, message in (
        (("merge", "linear", "--config", "merge.yaml", "--output", "out"), "elsewhere is not a directory"),
        (("merge", "ties", "--config", "merge.yaml", "--output", "out"), "set `base_model`"),
        (("merge", "linear", "--config", "none.yaml", "--output", "out"), "none.yaml does not exist"),
        (("round", "none.yaml"), "config file none.yaml does not exist"),
        (("round", "merge.yaml"), "run_dir: missing"),
    ):
        assert message in _message(capsys, monkeypatch, *words)
    assert not Path("out").exists()
