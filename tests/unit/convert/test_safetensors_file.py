"""Headers as the library writes them, and headers as an adversary writes them."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_post.convert.safetensors_file import DTYPES, BadSafetensors, header_of, raw_bytes, read_header


def test_same_bytes_as_the_library(tmp_path: Path) -> None:
    """The tensors have names with escaped characters and several dtypes. One is empty and one is a scalar."""
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        'quote"and\\': torch.ones(5, dtype=torch.bfloat16),
        "ä": torch.zeros(3, dtype=torch.uint8),
        "a": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES.values()},
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    header, places = header_of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    written = header + b"".join(bytes(raw_bytes(tensors[name])) for name in places)
    assert written == (tmp_path / "library").read_bytes()
    assert read_header(tmp_path / "library") == places
    assert load_file(tmp_path / "library")["a"].item() == 2.5


def _file(path: Path, header: Any, data: int = 64, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return path


def _one(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (_one(shape=[2**62, 2**62], data_offsets=[0, 64]), "w: offsets .* hold 64 bytes, but F32"),
        (_one(shape=[2**62], data_offsets=[0, 2**64]), "w: malformed"),
        (_one(shape=[2**61], data_offsets=[0, 2**62 * 2 - 8]), "w: offsets .* takes"),
        (_one(shape=[1024], data_offsets=[0, 4096]), "w: ends at byte .* truncated"),
        (_one(shape=[-4, -4]), "w: malformed"),
        (_one(shape=[4.0, 4]), "w: malformed"),
        (_one(shape=[True, 16]), "w: malformed"),
        (_one(shape="44"), "w: malformed"),
        (_one(data_offsets=[64, 0]), "w: offsets"),
        (_one(data_offsets=[-64, 0]), "w: malformed"),
        (_one(data_offsets=[0]), "w: malformed"),
        (_one(dtype="F33"), "w: unknown dtype"),
        (_one(dtype=["F32"]), "w: unknown dtype"),
        ({"w": 7}, "w: malformed"),
        ([1, 2], "not an object"),
        (b"{", "bad header"),
        (b"[" * 100_000, "bad header"),
        (json.dumps(_one()).encode("utf-16"), "bad header"),
        ({"w\x1b[31m": _one()["w"]}, "malformed tensor name"),
        (b'{"w": ' + b"9" * 5000 + b"}", "bad header"),
        (
            {**_one(data_offsets=[0, 64]), "v": {"dtype": "U8", "shape": [8], "data_offsets": [32, 40]}},
            "v: begins at byte .* overlaps",
        ),
        (
            {
                "w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                "v": {"dtype": "U8", "shape": [8], "data_offsets": [56, 64]},
            },
            "v: begins at byte .* gap",
        ),
        ({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, "56 bytes after the last"),
        (
            b'{"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}, "w": 1}',
            "'w' occurs twice",
        ),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = _file(tmp_path / "x.safetensors", header)
    with pytest.raises(BadSafetensors, match=f"{path}: .*{message}"):
        read_header(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12, 1000, 99_999_999])
def test_absurd_header_lengths_are_refused(tmp_path: Path, length: int) -> None:
    """The length alone decides. Nothing of that size is read."""
    path = _file(tmp_path / "x.safetensors", _one(), length=length)
    with pytest.raises(BadSafetensors, match=f"its header would take {length} of"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_too_short_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadSafetensors, match="not a readable"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_under_another_name_is_not_run(tmp_path: Path, zipped: bool) -> None:
    """The file would run code if it were unpickled."""
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    path = tmp_path / "model.safetensors"
    torch.save({"w": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadSafetensors, match="a pickle under another name"):
        read_header(path)
    assert not witness.exists()
