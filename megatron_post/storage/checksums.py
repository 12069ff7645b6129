"""Checksums of files and of values, in the form that manifests and messages use."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3
from isal.isal_zlib import crc32

# isal computes the CRC-32 of zlib several times faster. The rest of the package takes `crc32` from here.
__all__ = ["blake3_of_file", "crc32", "crc32_of_file", "sha256_of_file", "sha256_of_json"]

_BLOCK_BYTES = 2**20


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """SHA-256, in hex, of a JSON value. The order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def blake3_of_file(path: Path) -> str:
    """BLAKE3 of a file, in hex. It is several times faster than SHA-256."""
    digest = blake3()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def crc32_of_file(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    for block in _blocks(path):
        value = crc32(block, value)
    return value


def _blocks(path: Path) -> Iterator[memoryview]:
    """The content of a file. A block is overwritten by the next one."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]
