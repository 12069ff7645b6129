"""Pickles that would touch a file, in every form that a reader could meet, and signed manifests."""

import contextlib
import io
import json
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_post import cli
from megatron_post.convert.metadata_file import read_metadata
from megatron_post.storage import manifest
from megatron_post.storage.checksums import sha256_of_json


class Call:
    """An object whose pickle calls `function` with these arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def saved(value: Any, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def byte_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def poisons(witness: Path) -> dict[str, bytes]:
    """Contents of an entry that would touch `witness` if a pickle in them ran."""
    bomb = Call(Path.touch, witness)
    storage = Call(torch.storage._load_from_bytes, saved(bomb, legacy=True))
    return {
        "an object of the list": saved([bomb]),
        "the object alone": saved(bomb),
        "an old archive": saved([bomb], legacy=True),
        "a plain pickle": pickle.dumps(bomb),
        "os.system": saved([Call(os.system, f"touch {witness}")]),
        "Transformer Engine's state": saved([byte_tensor(pickle.dumps(bomb))]),
        "a storage in its state": saved([byte_tensor(pickle.dumps({"scale_fwd": storage}))]),
        "a file in memory": saved([io.BytesIO(saved(bomb))]),
    }


def sign(step: Path, names: Iterable[str] | None = None) -> None:
    """Write a manifest that fits the present files, as any attacker can.

    names: the files that it lists. By default the same files as before.
    """
    content = manifest.read_manifest(step)
    content["files"] = manifest.checksums(step, sorted(content["files"] if names is None else names))
    (step / manifest.MANIFEST).write_text(json.dumps({"sha256": sha256_of_json(content), **content}))


def entries(step: Path) -> dict[MetadataIndex, bool]:
    """Every entry of a checkpoint's data files, and whether it is an object and not a tensor."""
    metadata = read_metadata(step / ".metadata")
    kinds = metadata.state_dict_metadata
    return {i: isinstance(kinds[i.fqn], BytesStorageMetadata) for i in metadata.storage_data}


def replace_entry(step: Path, index: MetadataIndex, content: bytes) -> Path:
    """Append `content` to the file of an entry, and let the metadata point there."""
    metadata = read_metadata(step / ".metadata")
    file = step / metadata.storage_data[index].relative_path
    metadata.storage_data[index] = _StorageInfo(file.name, file.stat().st_size, len(content))
    with file.open("ab") as stream:
        stream.write(content)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(step)
    return file


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and output of `megatron-post ARGUMENTS`, in this process."""
    status, argv = 0, ["megatron-post", *map(str, arguments)]
    with (
        tempfile.TemporaryFile("w+") as output,  # a real file, because the watchdog needs a descriptor
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", argv),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        output.seek(0)
        return status, output.read()


@dataclass(frozen=True)
class Case:
    """A command that read a poisoned file. ran: whether the pickle in it was run."""

    what: str
    reader: str
    status: int
    output: str
    ran: bool


def run_on_poison(what: str, reader: str, arguments: tuple[object, ...], witness: Path) -> Case:
    """Run a command that reads the poisoned file."""
    status, output = command(*arguments)
    ran = witness.exists()
    witness.unlink(missing_ok=True)
    return Case(what, reader, status, output, ran)


def check(case: Case, *, named: str | None) -> None:
    """Nothing was run, and the refusal is one line.

    named: a text in the refusal, or None if the command does not read the changed file.
    """
    assert not case.ran, case
    assert "Traceback" not in case.output, case.output
    assert case.status == (0 if named is None else 2), case
    if named is not None:
        *_, last = case.output.splitlines()
        assert last.startswith("megatron-post: ") and named in last, case


def succeed(*arguments: object) -> None:
    """Run a command that must end with status 0."""
    status, output = command(*arguments)
    assert status == 0, output
