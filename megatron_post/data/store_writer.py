"""Writes a packed store under a temporary name and renames it, so that it is never visible incomplete."""

import contextlib
import ctypes
import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import zarr

from megatron_post.data.store import open_store
from megatron_post.data.store_checksums import StoreError, write_checksums
from megatron_post.data.store_columns import mapped
from megatron_post.data.store_format import (
    CHECKSUMS,
    COLUMNS,
    DTYPES,
    FORMAT,
    GROUPS,
    OFFSETS,
    PER_TOKEN,
    VERSION,
    GroupName,
    SourceCounts,
    StoreSettings,
)
from megatron_post.data.store_metadata import leftovers, read_attributes, read_settings
from megatron_post.storage.checksums import crc32
from megatron_post.storage.lock import sole_writer

# Tokens in a chunk file. The minimum keeps the number of files low if a small store grows. The maximum limits
# the buffer of the current chunk to 16 MiB of tokens. A million packs of 8,192 tokens are 2,000 files per
# array.
_MIN_CHUNK_TOKENS, _MAX_CHUNK_TOKENS = 2**18, 2**22
# The index of a group, with the types of its columns.
_INDEX = {OFFSETS: "<i8", CHECKSUMS: "<u4"} | {f"segment/{name}": dtype for name, dtype in COLUMNS.items()}


class StoreWriter:
    """A context manager that writes or extends a store. The result appears when the block ends without error.

    An existing store needs `overwrite`, which replaces it, or `append`, which adds packs of the same settings
    to it. The new store then has the files of full chunks by hard links, or copies where there are no links.
    The old store stays complete until the rename. Only one process at a time may write a store, and a second
    one gets an error. A writer removes the files of earlier writers that were killed. Raises `StoreError`.
    """

    def __init__(
        self, path: str | Path, settings: StoreSettings, *, overwrite: bool = False, append: bool = False
    ) -> None:
        self._path = Path(path)
        self._settings = settings
        self._beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        self._rows = self._path.with_name(f".{self._path.name}.rows")
        self._held = contextlib.ExitStack()
        self._overwrites, self._appends = overwrite, append
        self._written: set[GroupName] = set()
        if overwrite and append:
            raise StoreError("overwrite and append exclude each other; give one of them")
        self._check_existing()

    def _check_existing(self) -> None:
        """Raise `StoreError` unless the files at the path may be replaced or extended."""
        if not self._path.exists():
            return
        read_attributes(self._path)  # raises for a directory that is not a store, which is never replaced
        if not self._overwrites and not self._appends:
            raise StoreError(
                f"store {self._path} exists; give --append to add packs, --overwrite to replace it, or "
                "another data.store"
            )
        if self._appends and (existing := read_settings(self._path)) != self._settings:
            raise StoreError(
                f"store {self._path} was made with {_differences(existing, self._settings)}; packs of other "
                "settings cannot be added: give --overwrite, or another data.store"
            )

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(
                sole_writer(self._path.with_name(f".{self._path.name}.lock"), of=self._path)
            )
        except ValueError as error:
            raise StoreError(str(error)) from None
        with contextlib.ExitStack() as stack:
            stack.push(self._held)
            self._recover()
            # Recovery or another writer may have created a store here since the first check.
            self._check_existing()
            if self._appends and self._path.exists():
                # Check the old columns, because damaged ones would get new and valid checksums.
                for group in GROUPS:
                    store = open_store(self._path, group)
                    for name in COLUMNS:
                        store.column(name)
                _share(self._path, self._beside)
            else:
                attributes = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self._settings)}
                zarr.create_group(self._beside, attributes=attributes)
            stack.pop_all()
        return self

    @property
    def spill_directory(self) -> Path:
        """A directory beside the store for rendered rows. It stays until a store is complete."""
        self._rows.mkdir(exist_ok=True)
        return self._rows

    def _recover(self) -> None:
        """Restore a replaced store and remove partial ones. The lock proves that no writer lives."""
        for aside in leftovers(self._path, "replaced"):
            if not self._path.exists():
                aside.rename(self._path)
            shutil.rmtree(aside, ignore_errors=True)
        for partial in leftovers(self._path, "partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            try:
                if error is None:
                    self._publish()
                    shutil.rmtree(self._rows, ignore_errors=True)
            finally:
                shutil.rmtree(self._beside, ignore_errors=True)

    def _publish(self) -> None:
        for group in GROUPS:
            # A reader opens both groups, so a store without held-out rows has an empty group. Adding nothing
            # to a group also writes the columns of a store of an earlier version in the present form.
            if group not in self._written:
                self.write(
                    group, sources=[], columns={name: [] for name in COLUMNS}, segments_per_pack=[], packs=[]
                )
        root: Any = zarr.open_group(self._beside, mode="r")
        write_checksums(
            self._beside,
            {
                group: {
                    name: mapped(root[group][name], self._beside / group / name, dtype)
                    for name, dtype in _INDEX.items()
                }
                for group in GROUPS
            },
        )
        if not self._path.exists():
            os.rename(self._beside, self._path)
        elif not _exchange(self._beside, self._path):
            # If the process is killed between these two renames, the next writer restores the old store, and
            # a reader's error names its path.
            replaced = self._beside.with_suffix(".replaced")
            os.rename(self._path, replaced)
            os.rename(self._beside, self._path)
            shutil.rmtree(replaced, ignore_errors=True)

    def write(
        self,
        group: GroupName,
        *,
        sources: Sequence[SourceCounts],
        columns: Mapping[str, Any],
        segments_per_pack: Any,
        packs: Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Add packs to a group.

        sources: the sources that `columns["source"]` indexes. columns: all of `COLUMNS`, [segments] in pack
        order. segments_per_pack: int [packs]. packs: (tokens, roles) of each pack, [pack_length] each.

        Raises `StoreError` for a source that the group already has, because its rows would be duplicated.
        """
        self._written.add(group)
        node = self._group(group)
        known = node.attrs["sources"]
        twice = {entry["name"] for entry in known} & {source.name for source in sources}
        if twice:
            raise StoreError(
                f"store {self._path}/{group} already has the source(s) {', '.join(sorted(twice))}; leave out "
                "the source, or give it another name to add its rows again"
            )
        shift = {"source": len(known), "unit": _next_unit(node)}
        for name, dtype in COLUMNS.items():
            values = np.asarray(columns[name], dtype=dtype)
            _extend(node, f"segment/{name}", values + values.dtype.type(shift.get(name, 0)))
        counts = np.asarray(segments_per_pack, dtype=np.int64)
        _extend(node, OFFSETS, int(node[OFFSETS][-1]) + np.cumsum(counts))
        self._extend_packs(node, packs, len(counts))
        node.attrs["sources"] = [*known, *map(dataclasses.asdict, sources)]

    def _group(self, name: GroupName) -> Any:
        root: Any = zarr.open_group(self._beside, mode="r+")
        if name in root:
            return root[name]
        node = root.create_group(name, attributes={"sources": []})
        for column, dtype in _INDEX.items():
            first = {OFFSETS: np.zeros(1), CHECKSUMS: np.zeros((0, len(PER_TOKEN)))}.get(column, np.zeros(0))
            _write_column(node, column, first.astype(dtype))
        return node

    def _extend_packs(self, node: Any, packs: Iterable[tuple[np.ndarray, np.ndarray]], count: int) -> None:
        arrays = [self._per_token_array(node, name, count) for name in PER_TOKEN]
        start, (in_chunk, length) = arrays[0].shape[0], arrays[0].chunks
        for array in arrays:
            array.resize((start + count, length))
        buffers = [np.zeros((in_chunk, length), dtype=array.dtype) for array in arrays]
        filled, checksums = 0, []
        for number, pack in enumerate(packs, start=start + 1):
            for buffer, values in zip(buffers, pack, strict=True):
                buffer[filled] = values
            checksums.append([crc32(buffer[filled]) for buffer in buffers])
            filled += 1
            if number % in_chunk == 0 or number == start + count:
                for array, buffer in zip(arrays, buffers, strict=True):
                    array[number - filled : number] = buffer[:filled]
                filled = 0
        if len(checksums) != count:
            raise StoreError(f"{len(checksums)} packs were given, but segments_per_pack has {count}")
        _extend(node, CHECKSUMS, np.array(checksums, dtype="<u4").reshape(-1, len(PER_TOKEN)))

    def _per_token_array(self, node: Any, name: str, count: int) -> Any:
        if name in node:
            return node[name]
        length = self._settings.pack_length
        least, most = max(_MIN_CHUNK_TOKENS // length, 1), max(_MAX_CHUNK_TOKENS // length, 1)
        return node.create_array(
            name,
            shape=(0, length),
            chunks=(min(max(count, least), most), length),
            dtype=PER_TOKEN[name],
            compressors=None,
            dimension_names=("pack", "token"),
            # Packs are read without zarr, so a chunk of zeros must be a file too.
            config={"write_empty_chunks": True},
        )


def _extend(node: Any, name: str, values: np.ndarray) -> None:
    """Write a column again with more rows. It is small beside the tokens, and stays one file."""
    _write_column(node, name, np.concatenate([node[name][:], values.astype(_INDEX[name])]))


def _write_column(node: Any, name: str, values: np.ndarray) -> None:
    node.create_array(
        name,
        data=values,
        chunks=(max(len(values), 1), *values.shape[1:]),
        compressors=None,
        overwrite=True,
        # The file is mapped, so a column of zeros must be a file too.
        config={"write_empty_chunks": True},
    )


def _share(store: Path, target: Path) -> None:
    """Copy a store, but give the chunks that nothing will write to a second name, as a hard link.

    These are all chunks of tokens and roles except a last one that has room for more packs, and the reference
    log-probabilities. They are copied too if the file system has no links, or does not permit them.
    """
    root: Any = zarr.open_group(store, mode="r")
    arrays = [root[group][name] for group in GROUPS for name in PER_TOKEN if name in root[group]]
    open_chunks = {f"{array.path}/c/{array.shape[0] // array.chunks[0]}/0" for array in arrays}
    shared = {(group, name, "c") for group in GROUPS for name in DTYPES}

    def share(source: str, copy: str) -> None:
        name = Path(source).relative_to(store)
        if name.parts[:3] in shared and name.as_posix() not in open_chunks:
            with contextlib.suppress(OSError):
                os.link(source, copy)
                return
        shutil.copy2(source, copy)

    shutil.copytree(store, target, copy_function=share)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories atomically, so that a directory named `b` exists at every moment.

    Returns False if this is not supported. Only Linux can do it, and not on every network file system.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD of linux/fcntl.h, and RENAME_EXCHANGE of linux/fs.h
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _next_unit(node: Any) -> int:
    units = node["segment/unit"]
    return int(units[:].max()) + 1 if units.shape[0] else 0


def _differences(existing: StoreSettings, wanted: StoreSettings) -> str:
    old, new = dataclasses.asdict(existing), dataclasses.asdict(wanted)
    return ", ".join(
        f"{name}={old[name]} (now {new[name]})"
        for name in old
        if name != "tokenizer_path" and old[name] != new[name]
    )
