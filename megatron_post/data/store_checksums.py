"""Reads and writes `checksums.json`, the SHA-256 of a store's metadata files and of its columns' values.

Each pack has a CRC-32 in the array `checksums` of its group. That array is one of the columns here. So this
small file covers everything in the store except the reference log-probabilities. The blocks of a column have
checksums too, so that a reader can use a part of a column. Stores of earlier versions do not have these.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_post.data.store_columns import block_checksums
from megatron_post.storage.checksums import sha256_of_file, sha256_of_json
from megatron_post.storage.files import write_durably
from megatron_post.storage.reading import read_object

FILE = "checksums.json"
# Codecs of zarr that can only decode numbers. Damaged or malicious metadata may name codecs that load
# objects.
_CODECS = {"bytes", "zstd", "crc32c"}
_REMEDY = "run `megatron-post data pack` again"


class StoreError(ValueError):
    """A store cannot be used or must not be written. The message has the values and the remedy."""


@dataclass(frozen=True)
class StoreChecksums:
    """The checksums of a store.

    files: SHA-256 of each metadata file by its path in the store. groups: SHA-256 of each array by its name,
    for each group. blocks: CRC-32 of each array's blocks, uint32 in hex, for each group. Stores of earlier
    versions have none.
    """

    files: Mapping[str, str]
    groups: Mapping[str, Mapping[str, str]]
    blocks: Mapping[str, Mapping[str, str]]

    def arrays(self, group: str) -> Mapping[str, str]:
        """SHA-256 of the values of a group's columns. Raises `StoreError` if the group is missing."""
        if group not in self.groups:
            raise StoreError(f"{FILE} names no group {group!r}; {_REMEDY}")
        return self.groups[group]


def array_digest(values: np.ndarray) -> str:
    """SHA-256, in hex, of an array's type, shape and values."""
    digest = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_checksums(path: Path, groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write `checksums.json` of the store at `path`. groups: the values of each group's columns by name."""
    files = [Path("zarr.json")]
    for group, arrays in groups.items():
        files += [Path(group) / name for name in _metadata_names(list(arrays))]
    content = {
        "files": {str(file): sha256_of_file(path / file) for file in files},
        "groups": {
            group: {name: array_digest(values) for name, values in arrays.items()}
            for group, arrays in groups.items()
        },
        "blocks": {
            group: {name: block_checksums(values).tobytes().hex() for name, values in arrays.items()}
            for group, arrays in groups.items()
        },
    }
    text = json.dumps({"sha256": sha256_of_json(content), **content}, indent=1)
    write_durably(path / FILE, text)


def read_checksums(path: Path) -> StoreChecksums:
    """The checksums of a store, after a comparison with its metadata files.

    This must run before zarr reads the store. Raises `StoreError` for a metadata file that is missing or has
    changed, and for a codec that could load objects.
    """
    try:
        content = read_object(path / FILE, "the checksums of a packed store")
        stated = content.pop("sha256", None)
        if stated != sha256_of_json(content):
            raise StoreError(f"{path / FILE}: its content differs from its own checksum")
        checksums = StoreChecksums(
            files=_texts(content, "files"),
            groups={name: _texts(content["groups"], name) for name in content["groups"]},
            blocks={name: _texts(content["blocks"], name) for name in content.get("blocks", {})},
        )
        for name, digest in checksums.files.items():
            _check_metadata(path, name, digest)
    except StoreError as error:
        raise StoreError(f"{error}; {_REMEDY}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"store {path}: {FILE} is damaged: {error}; {_REMEDY}") from error
    wanted = {
        str(Path(group) / name)
        for group, arrays in checksums.groups.items()
        for name in _metadata_names(list(arrays))
    }
    if missing := sorted({"zarr.json", *wanted} - set(checksums.files)):
        raise StoreError(f"store {path}: {FILE} does not name {missing[0]}; {_REMEDY}")
    return checksums


def _metadata_names(arrays: Sequence[str]) -> list[str]:
    """The metadata files of a group with these columns, including those of the per-token arrays."""
    return ["zarr.json", "segment/zarr.json", *(f"{name}/zarr.json" for name in ("tokens", "roles", *arrays))]


def _check_metadata(path: Path, name: str, digest: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise StoreError(f"store {path}: {FILE} names {name!r}, which is outside the store")
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise StoreError(f"store {path}: {name} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise StoreError(f"store {path}: {name} differs from its checksum")
    codecs = {str(codec["name"]) for codec in json.loads(content).get("codecs", [])}
    if codecs - _CODECS:
        raise StoreError(
            f"store {path}: {name} names the codec {min(codecs - _CODECS)!r}, which is not allowed here"
        )


def _texts(content: Any, key: str) -> dict[str, str]:
    values = content[key]
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{key} holds values that are not checksums")
    return values
