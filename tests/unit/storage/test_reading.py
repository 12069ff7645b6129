"""Every fault of a file is one `ValueError` that names it, and a pipe is never opened."""

import csv
import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatron_post.storage import reading as module
from megatron_post.storage.reading import did_you_mean, plain_file, read_json, read_object, reading


class Numbers(BaseModel):
    a: int
    b: int


def _pydantic() -> None:
    Numbers.model_validate({"a": "x"})


def _deep() -> None:
    json.loads("[" * 100_000)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (_pydantic, r"f: a: Input should be a valid integer.*; b: Field required"),
        (_deep, "f: not a model: RecursionError: nested too deeply"),
        (lambda: b"\xff".decode(), "f: not a model: UnicodeDecodeError: "),
        (lambda: {}["a"], "f: not a model: KeyError: 'a'"),  # type: ignore[index]
        (lambda: zlib.decompress(b"x"), "f: not a model: error: "),
        (lambda: list(csv.reader(["\0"], strict=True)) and 1 // 0, "f: not a model: "),
        (lambda: pickle.loads(b"junk"), "f: not a model: "),
        (lambda: struct.unpack("<i", b"x"), "f: not a model: error: "),
        (lambda: open("/nonexistent/f"), "f: not a model: FileNotFoundError: No such file"),  # noqa: SIM115
        (lambda: bytearray(2**62), "f: not a model: MemoryError: this machine has not enough memory"),
    ],
)
def test_an_error_names_the_file(act: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), reading("f", "a model"):
        act()  # type: ignore[operator]


def test_an_error_that_already_names_the_file_is_not_changed() -> None:
    with pytest.raises(ValueError, match=r"^f: wrong value$"), reading("f", "a model"):
        raise ValueError("f: wrong value")


@pytest.mark.parametrize("content", ["[1", "[]", "null", "[" * 10**5, '{"a": ' + "1" * 5000 + "}"])
def test_json_that_is_not_an_object_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not a record: "):
        read_object(path, "a record")


def test_json_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json", "a record") == {"a": 1}
    monkeypatch.setattr(module, "LARGEST_JSON", 7)
    with pytest.raises(ValueError, match=r"a\.json: not a record: it has 8 bytes, and no more than 7"):
        read_json(tmp_path / "a.json", "a record")


def test_anything_but_a_regular_file_is_an_error(tmp_path: Path) -> None:
    """A pipe is not opened, because that would wait for a writer forever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "settings.yaml").write_text("a: 1")
    (tmp_path / "link").symlink_to("settings.yaml")
    for name, message in {
        "pipe": "is not a regular file",
        "loop": "is not a regular file",
        ".": "is a directory",
        "nothing": "does not exist$",
        "setings.yaml": r"does not exist \(did you mean .*/settings.yaml\?\)",
        "a\0b": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            plain_file(tmp_path / name, "file")
    assert plain_file(tmp_path / "link", "file") == tmp_path / "link"


def test_did_you_mean() -> None:
    assert did_you_mean("gsm8", ["gsm8k", "math"]) == " (did you mean 'gsm8k'?)"
    assert did_you_mean("zzz", ["gsm8k", "math"]) == ""
