"""Decides which tensor goes into which safetensors file."""

import re
from collections.abc import Mapping
from fractions import Fraction

from megatron_post.convert.source import Kind

SHARD_BYTES = 5 * 10**9
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20,
          "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def plan_shards(tensors: Mapping[str, Kind], *, max_bytes: int) -> list[list[str]]:
    """The names of each file's tensors, grouped as `save_pretrained(max_shard_size=...)` groups them.

    Tensors fill a file in order until the next one would exceed `max_bytes`. A tensor that is larger than
    `max_bytes` has a file to itself.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    held = 0
    for name, kind in tensors.items():
        if kind.nbytes > max_bytes:
            shards.append([name])
            continue
        if held + kind.nbytes > max_bytes:
            shards.append(current)
            current, held = [], 0
        current.append(name)
        held += kind.nbytes
    return [*shards, current] if current else shards


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 0) of `count`."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def parse_size(text: str) -> int:
    """The bytes of "5GB" (powers of ten, as in `transformers`), "4GiB" (powers of two) or a plain number.

    Raises `ValueError` for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip(), re.IGNORECASE)
    size = 0 if match is None else int(Fraction(match[1]) * (_UNITS[match[2].upper()] if match[2] else 1))
    if size < 1:
        raise ValueError(f"size {text!r} is not understood; write 5GB, 500MB or 4GiB")
    return size
