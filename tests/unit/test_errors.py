"""A user's error gives one message and status 2. Any other error gives a traceback and status 1."""

import csv
import errno
import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from megatron_post import cli
from megatron_post.errors import exit_status

OF_A_USER = [
    ValueError("a.yaml: train.steps=-1 is below 1"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    FloatingPointError("the loss is not finite"),
    json.JSONDecodeError("Expecting value", "", 0),
    csv.Error("line contains NUL"),
    gzip.BadGzipFile("Not a gzipped file"),
    zlib.error("Error -3 while decompressing data"),
    EOFError("Compressed file ended before the end-of-stream marker was reached"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    *(
        OSError(number, os.strerror(number), "runs/a")
        for number in (*errno.errorcode,)
        if number != errno.EPIPE
    ),
]


def _raising(error: BaseException) -> int:
    def command() -> None:
        raise error

    return exit_status(command)


@pytest.mark.parametrize("error", OF_A_USER, ids=lambda error: f"{type(error).__name__}-{error}"[:60])
def test_a_users_error_is_one_line(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(error) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("megatron-post: ") and shown.err.count("\n") == 1
    if isinstance(error, OSError) and error.filename:
        assert f"runs/a: {error.strerror}; " in shown.err


@pytest.mark.parametrize("error", [KeyError("role"), TypeError("x"), AssertionError(), RuntimeError("NCCL")])
def test_an_unexpected_error_keeps_its_traceback(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _raising(error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "please report it" in shown


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATRON_POST_DEBUG", "1")
    assert _raising(ValueError("\x1b[2J")) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "\x1b" not in shown


@pytest.mark.parametrize("debug", ["", "1"])
def test_errors_hide_secrets(
    debug: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Secrets are hidden in the message, in its cause, and in an option that does not exist."""
    monkeypatch.setenv("MEGATRON_POST_DEBUG", debug)
    error = ValueError("http://me:s3cr3t@host/v1?api_key=s3cr3t does not answer")
    error.__cause__ = OSError("401 for Bearer s3cr3t")
    _raising(error)
    _raising(KeyError("HF_TOKEN=s3cr3t"))
    monkeypatch.setattr(sys, "argv", ["megatron-post", "train", "--api-key=s3cr3t"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "***" in shown and "s3cr3t" not in shown


def test_torch_out_of_host_memory_is_a_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: torch.empty(2**50)) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'CONFIG'"),
        (["demo", "--seeds", "99"], "--seeds"),
        (["config", "schema", "rounds"], "Invalid value for 'file': 'rounds' is not one of 'run', 'round',"),
        (["synthesize", "run", "code_execution"], "code_execution is a recipe"),
        (["data", "show", "x", "--gruop", "eval"], "--group"),
        (["train", "\x1b]52;c;aGk=\x07[red]a"], r"\x1b]52;c;aGk=\x07[red]a"),
        (["data", "stats", "a\0b"], r"a\x00b"),
    ],
)
def test_wrong_commands(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-post", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and told in shown.err and shown.err.count("\n") == 1
    assert "\x1b" not in shown.out + shown.err


def test_a_pipe_that_is_closed_and_a_terminal_without_unicode(tmp_path: Path) -> None:
    """As processes, `| head` gives no traceback, and a terminal with only ASCII shows an escaped name."""
    shell = f"{sys.executable} -m megatron_post config schema | head -1; exit ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert piped.stderr == ""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "megatron_post", "train", "größe.yaml"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 2 and r"gr\xf6\xdfe.yaml" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["plan", "serch", "--gpus", "8"], "'search'"),
        (["launch", "statsu", "runs/a"], "'status'"),
        (["plan", "show", "CONFIG", "--gpus", "8", "--gpu", "h100-80bg"], "'h100-80gb'"),
        (["convert", "plan", "llama3_8d"], "'llama3_8b'"),
        (["convert", "inspect", "modle"], "model"),
        (["train", "stf.yaml"], "sft.yaml"),
    ],
)
def test_did_you_mean(
    arguments: list[str],
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("sft.yaml").write_text("stage: sft\n")
    config = str(Path(__file__).resolve().parents[2] / "configs" / "llama3_8b" / "sft.yaml")
    words = [config if word == "CONFIG" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["megatron-post", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err.lower()
    assert ended.value.code == 2 and "did you mean" in shown and meant in shown.split("did you mean")[1]


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("--optimizer.lr=1", "optimizer.lr=1"),
        ("--seed=3", "seed=3"),
        ("-optimizer.lr=1", "optimizer.lr=1"),
        ("--optimizer.lr", "optimizer.lr=VALUE"),
    ],
)
def test_an_override_with_hyphens_is_shown_without(
    option: str, right: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-post", "train", "a.yaml", option, "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().err
    assert end.value.code == 2 and f"write {right}, without hyphens before it" in shown
