"""Makes a small store of recognisable packs for the tests of stores and loaders."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from megatron_post.data import store_checksums
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import (
    CHECKSUMS,
    COLUMNS,
    GROUPS,
    OFFSETS,
    PER_TOKEN,
    SourceCounts,
    StoreSettings,
)
from megatron_post.data.store_writer import StoreWriter

SETTINGS = StoreSettings(
    pack_length=16, segment_multiple=4, tokenizer_fingerprint="f" * 64, pad_id=99, seed=1, tokenizer_path="t"
)


def columns_of(num_packs: int) -> dict[str, np.ndarray]:
    """The columns of packs of 16 tokens.

    Each pack p has a segment of 5 real tokens that is padded to 8. Odd packs have a second segment of 8
    tokens, and even packs end with 8 tokens of padding. The sample ids are 100 p and 100 p + 1.
    """
    rows = [(p, second) for p in range(num_packs) for second in range(1 + p % 2)]
    pack, second = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    return {
        "padded": np.full(len(rows), 8),
        "length": np.where(second == 1, 8, 5),
        "source": second,
        "sample": 100 * pack + second,
        "unit": np.arange(len(rows)),
        "rank": np.full(len(rows), -1),
        "turns": np.ones(len(rows)),
        "response": np.full(len(rows), 2),
    }


def tokens_of(pack: int) -> np.ndarray:
    return (np.arange(16) + 1000 * pack).astype(np.int32)


def write_packs(
    writer: StoreWriter,
    num_packs: int,
    *,
    names: tuple[str, str] = ("a", "b"),
    tokens: np.ndarray | None = None,
) -> None:
    writer.write(
        "train",
        sources=[SourceCounts(name, rows=num_packs) for name in names],
        columns=columns_of(num_packs),
        segments_per_pack=[1 + p % 2 for p in range(num_packs)],
        packs=(
            (tokens_of(p) if tokens is None else tokens, np.full(16, p % 5, dtype=np.uint8))
            for p in range(num_packs)
        ),
    )


def small_store(path: Path, num_packs: int, *, tokens: np.ndarray | None = None) -> PackStore:
    with StoreWriter(path, SETTINGS) as writer:
        write_packs(writer, num_packs, tokens=tokens)
    return open_store(path, "train")


def seal(path: Path, *, only_metadata: bool = False) -> None:
    """Write checksums that match the changed files of a store, as an attacker would.

    only_metadata: leave the checksums of columns, because zarr cannot open the changed metadata.
    """
    if only_metadata:
        content = json.loads((path / store_checksums.FILE).read_text())
        del content["sha256"]
        for name in content["files"]:
            content["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (path / store_checksums.FILE).write_text(json.dumps({"sha256": digest, **content}))
        return
    root: Any = zarr.open_group(path, mode="r+")
    for group in GROUPS:
        node = root[group]
        rows = zip(*(node[name][:] for name in PER_TOKEN), strict=True)
        checksums = [[zlib.crc32(np.ascontiguousarray(row)) for row in pack] for pack in rows]
        node[CHECKSUMS][:] = np.array(checksums, dtype="<u4").reshape(-1, 2)
    names = [OFFSETS, CHECKSUMS, *(f"segment/{name}" for name in COLUMNS)]
    groups = {group: {name: root[group][name][:] for name in names} for group in GROUPS}
    store_checksums.write_checksums(path, groups)
