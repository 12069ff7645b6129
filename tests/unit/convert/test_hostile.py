"""Directories that must not be converted. The error names the file, nothing is run and nothing is written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from megatron_post.convert.jobs import convert
from megatron_post.convert.metadata_file import read_metadata
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron
from megatron_post.convert.torch_file import saved_tensors
from megatron_post.convert.verify import compare_models
from megatron_post.storage import manifest
from megatron_post.storage.checksums import sha256_of_json
from tests.unit.convert.models import shaped_like, to_hf, to_megatron, weights_of, write_hf

MODEL = shaped_like("8b")
NAME = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def _tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _refused(tmp_path: Path, job: object, message: str) -> None:
    """The conversion raises, and every file under `tmp_path` stays as it was."""
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(job, workers=1, report=print)  # type: ignore[arg-type]
    assert _tree(tmp_path) == before


def _point_at(directory: Path, file: str) -> None:
    """Make the index say that a tensor is in `file`."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][NAME] = file
    (directory / INDEX).write_text(json.dumps(index))


def _link(directory: Path, name: str) -> None:
    outside = directory.parent / "outside"
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)


def _first(directory: Path) -> Path:
    return directory / "model-00001-of-00003.safetensors"


def _configure(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(_first(directory))
    change(tensors)
    save_file(tensors, _first(directory))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "index: parent": (lambda d: _point_at(d, "../outside"), "file name '../outside' points outside"),
    "index: absolute": (lambda d: _point_at(d, "/etc/passwd"), "'/etc/passwd' points outside"),
    "index: directory": (lambda d: _point_at(d, ".."), "'..' points outside"),
    "index: linked file": (lambda d: _link(d, _first(d).name), "00003.safetensors' is a link that points"),
    "index is a link": (lambda d: _link(d, INDEX), f"'{INDEX}' is a link that points outside"),
    "index: missing file": (lambda d: _point_at(d, "model-9.safetensors"), "model-9.safetensors: missing"),
    "index: no map": (lambda d: (d / INDEX).write_text("[]"), "not an index"),
    "index: numbers": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "not an index"),
    "config is a link": (lambda d: _link(d, "config.json"), "'config.json' is a link that points outside"),
    "tokenizer is a link": (lambda d: _link(d, "tokenizer.json"), "'tokenizer.json' is a link that points"),
    "pickle as safetensors": (lambda d: torch.save({"w": 1}, _first(d)), f"{_first(Path()).name}: .*pickle"),
    "truncated": (
        lambda d: _first(d).write_bytes(_first(d).read_bytes()[:-7]),
        rf"{_first(Path()).name}: model\.\S+: ends at byte \d+, the file at \d+: truncated",
    ),
    "missing": (
        lambda d: _rewrite(d, lambda t: t.__delitem__("model.embed_tokens.weight")),
        "model.embed_tokens.weight is in the index and not in the file",
    ),
    "extra": (
        lambda d: _rewrite(d, lambda t: t.update({"extra.weight": torch.ones(2)})),
        f"{_first(Path()).name}: tensor extra.weight is in the file and not in the index",
    ),
    "wrong shape": (
        lambda d: _rewrite(d, lambda t: t.update({"model.embed_tokens.weight": torch.ones(252, 64)})),
        r"00003.safetensors: model.embed_tokens.weight has shape \(252, 64\), expected \(253, 64\)",
    ),
    "integers": (
        lambda d: _rewrite(d, lambda t: t.update({"model.embed_tokens.weight": torch.ones(253, 64).int()})),
        "model.embed_tokens.weight is torch.int32",
    ),
    "bin": (
        lambda d: [p.rename(p.with_suffix(".bin")) for p in d.glob("*.s*") if p.name != "x"]
        and (d / INDEX).unlink(missing_ok=True),
        "pickled .bin weights.*safe_serialization",
    ),
    "config: not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not the config"),
    "config: a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: not the config"),
    "config: nested": (
        lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: not the config of .*Recursion"
    ),
    "config: words": (lambda d: _configure(d, vocab_size="x"), "config.json: vocab_size: Input should be"),
    "config: layers": (lambda d: _configure(d, num_hidden_layers=10**9), "config.json: num_layers: Input"),
    "config: heads": (lambda d: _configure(d, num_attention_heads=7), "config.json: 7 attention heads"),
    "config: head_dim": (lambda d: _configure(d, head_dim=4), "config.json: head_dim=4; .* only 2 is supp"),
    "config: activation": (lambda d: _configure(d, hidden_act="gelu"), "config.json: hidden_act='gelu'"),
    "config: another shape": (
        lambda d: _configure(d, intermediate_size=225),
        r"gate_proj.weight has shape \(224, 64\), expected \(225"
    ),
    "index: terminal codes": (lambda d: _point_at(d, "\x1b[31m"), "names are printable strings"),
    "index: link to itself": (
        lambda d: (_first(d).unlink(), _first(d).symlink_to(_first(d).name)),
        "00003.safetensors: Symlink loop"
    ),
    "index beside a single file": (
        lambda d: shutil.copy(_first(d), d / "model.safetensors"), "and model.safetensors; remove one"
    ),
    "names with terminal codes": (
        lambda d: _rewrite(d, lambda t: t.update({"\x1b[31m": torch.ones(2)})),
        r"00003.safetensors: malformed tensor name '\\x1b",
    ),
    "huge model": (
        lambda d: (d / "config.json").write_text(
            (d / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
        ),
        "9 tensor.s. missing, the first is model.layers.3.self_attn.q_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_hugging_face_directory_is_refused(tmp_path: Path, name: str) -> None:
    break_it, message = BREAKS[name]
    directory = write_hf(tmp_path / "hf", MODEL, weights_of(MODEL), shards=3)
    (tmp_path / "outside").write_bytes(b"not yours")
    break_it(directory)
    _refused(tmp_path, ToMegatron(str(directory), str(tmp_path / "checkpoints")), message)


def test_missing_and_extra_without_an_index(tmp_path: Path) -> None:
    tensors = weights_of(MODEL)
    write_hf(tmp_path / "a", MODEL, {n: t for n, t in tensors.items() if n != NAME})
    _refused(tmp_path, ToMegatron(str(tmp_path / "a"), str(tmp_path / "c")), f"missing, the first is {NAME}")
    write_hf(tmp_path / "b", MODEL, tensors | {"model.layers.3.x": torch.ones(1)})
    _refused(tmp_path, ToMegatron(str(tmp_path / "b"), str(tmp_path / "c")), "the first is model.layers.3.x")


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """The Hugging Face cache links a snapshot's files into the blobs of the same repository."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    write_hf(snapshot, MODEL, weights_of(MODEL))
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    to_megatron(snapshot, tmp_path / "checkpoints")


class _Bomb:
    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> object:
        return (Path.touch, (self._witness,))


def _resign(step: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and update the manifest's checksum, as an adversary would."""
    (step / name).write_bytes(content)
    found = manifest.read_manifest(step)
    found["files"][name] = manifest.checksums(step, [name])[name]
    text = json.dumps({"sha256": sha256_of_json(found), **found})
    (step / manifest.MANIFEST).write_text(text)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_pickles_in_a_checkpoint_are_not_run(tmp_path: Path, name: str) -> None:
    """The metadata or a chunk calls a function, and the manifest's checksum is right."""
    write_hf(tmp_path / "hf", MODEL, weights_of(MODEL))
    root = tmp_path / "checkpoints"
    convert(ToMegatron(str(tmp_path / "hf"), str(root)), workers=1, report=print)
    step, witness = root / "step-00000000", tmp_path / "witness"
    if name == ".metadata":
        _resign(step, name, pickle.dumps(_Bomb(witness)))
        message = "metadata: refers to pathlib"
    else:
        content = bytearray((step / name).read_bytes())
        torch.save(_Bomb(witness), tmp_path / "bomb")
        bomb = (tmp_path / "bomb").read_bytes()
        info = read_metadata(step / ".metadata")
        first = next(i for i in info.storage_data.values() if i.offset == 0)
        content[: first.length] = bomb + bytes(first.length - len(bomb))
        _resign(step, name, bytes(content))
        message = "__0_0.distcp: not a file of plain tensors; nothing in it was run"
    with pytest.raises(ValueError, match=message):
        convert(ToHuggingFace(str(root), str(tmp_path / "back")), workers=1, report=print)
    assert not witness.exists() and not (tmp_path / "back").exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    """A flipped bit, a truncated file and a missing file are refused with the file's name."""
    write_hf(tmp_path / "hf", MODEL, weights_of(MODEL))
    root = to_megatron(tmp_path / "hf", tmp_path / "checkpoints")
    step = root / "step-00000000"
    file = step / "__1_0.distcp"
    info = read_metadata(step / ".metadata").storage_data
    last = max((i for i in info.values() if i.relative_path == file.name), key=lambda i: i.length)
    _flip(file, last.offset + last.length // 2)
    job = ToHuggingFace(str(root), str(tmp_path / "back"))
    with pytest.raises(ValueError, match=rf"{file}: the chunk of \S+ at \S+, .*is damaged"):
        convert(job, workers=1, report=print)
    assert not (tmp_path / "back").exists()
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{file}: .* bytes, .* in the manifest"):
        convert(ToHuggingFace(str(root), str(tmp_path / "other")), workers=1, report=print)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file}: missing"):
        convert(ToHuggingFace(str(root), str(tmp_path / "other")), workers=1, report=print)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no files": (lambda m: m.pop("files"), "KeyError: 'files'"),
    "files in a list": (lambda m: m.update(files=[1]), "AttributeError: 'list'"),
    "no state": (lambda m: m.pop("state"), "KeyError: 'state'"),
    "a file that is a number": (lambda m: m["files"].update({".metadata": 3}), "TypeError: 'int'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests_are_refused(tmp_path: Path, name: str) -> None:
    """A malformed manifest with a right checksum is refused as any other, without a traceback."""
    root = to_megatron(write_hf(tmp_path / "hf", MODEL, weights_of(MODEL)), tmp_path / "checkpoints")
    step, (change, message) = root / "step-00000000", MALFORMED[name]
    found = manifest.read_manifest(step)
    change(found)
    (step / manifest.MANIFEST).write_text(json.dumps({"sha256": sha256_of_json(found), **found}))
    _refused(
        tmp_path, ToHuggingFace(str(step), str(tmp_path / "back")), f"{step}: not a checkpoint .*{message}"
    )


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Metadata({}, storage_data={1: 5})),
        b"\x80\x04\x8e" + b"\xff" * 4 + b"\0\0\0\x10",
        b"(" * 10**6,
    ],
    ids=["numbers", "claims 2^60 bytes", "nested"],
)
def test_malformed_metadata_is_refused(tmp_path: Path, content: bytes) -> None:
    root = to_megatron(write_hf(tmp_path / "hf", MODEL, weights_of(MODEL)), tmp_path / "checkpoints")
    _resign(root / "step-00000000", ".metadata", content)
    _refused(tmp_path, ToHuggingFace(str(root), str(tmp_path / "back")), f"{root}")


@pytest.mark.parametrize("row", [240, 255])
def test_damage_beside_padding_is_found(tmp_path: Path, row: int) -> None:
    """Both commands that read a chunk find a flipped bit in it, even if they do not need the damaged row.

    The last chunk has rows 234 to 255. The last 3 rows are padding and are not read.
    """
    model = MODEL.model_copy(update={"vocab_size": 256})
    root = to_megatron(write_hf(tmp_path / "hf", model, weights_of(model)), tmp_path / "checkpoints")
    step = root / "step-00000000"
    config = (step / "config.json").read_text().replace('"vocab_size": 256', '"vocab_size": 253')
    _resign(step, "config.json", config.encode())
    to_hf(root, tmp_path / "good")
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        copy = tmp_path / key
        shutil.copytree(step, copy)
        storage = read_metadata(copy / ".metadata").storage_data
        place = next(p for i, p in storage.items() if (i.fqn, tuple(i.offset)) == (key, (234, 0)))
        saved = saved_tensors(copy / place.relative_path, offset=place.offset, length=place.length)[""].stored
        _flip(copy / place.relative_path, saved.offset + (row - 234) * saved.row_bytes)
        message = rf"{copy / place.relative_path}: the chunk of {key} at \(234, 0\) is damaged"
        with pytest.raises(ValueError, match=message):
            convert(ToHuggingFace(str(copy), str(tmp_path / "back")), workers=1, report=print)
        with pytest.raises(ValueError, match=message):
            compare_models(str(copy), str(copy), report=print)
    assert not (tmp_path / "back").exists()


def test_overlapping_chunks_are_refused(tmp_path: Path) -> None:
    """Two chunks of the same rows have the size of the whole tensor, but some rows would be garbage."""
    root = to_megatron(write_hf(tmp_path / "hf", MODEL, weights_of(MODEL)), tmp_path / "checkpoints")
    step = root / "step-00000000"
    metadata = read_metadata(step / ".metadata")
    chunks = metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks
    assert chunks[0].sizes == chunks[1].sizes
    chunks[1] = chunks[0]
    _resign(step, ".metadata", pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"metadata: chunks of \S+weight overlap"):
        convert(ToHuggingFace(str(root), str(tmp_path / "back")), workers=1, report=print)


def _flip(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))
