"""Reads packed stores. `store_format` describes their format.

All data is compared with its checksum before it is used. That happens for metadata when the store is opened,
for a block of a column when it is first used, and for a pack each time it is read. `data verify` reads
everything. A reader opens files by path. If its store has been replaced, the checksums differ, so it gets an
error and never a mixture of two stores.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from megatron_post.data.pack import Pack, pack_of_segments, tail_lengths
from megatron_post.data.store_checksums import (
    StoreChecksums,
    StoreError,
    array_digest,
    read_checksums,
)
from megatron_post.data.store_format import (
    CHECKSUMS,
    DTYPES,
    OFFSETS,
    PER_TOKEN,
    REFERENCE,
    GroupName,
    SourceCounts,
    StoreSettings,
)
from megatron_post.data.store_index import StoreIndex
from megatron_post.data.store_metadata import damage, read_settings
from megatron_post.data.template import TokenRole
from megatron_post.storage.checksums import crc32, sha256_of_json
from megatron_post.storage.reading import plain_file, plain_files


class PackStore:
    """One group of a store, for reading by any number of threads and ranks. `open_store` makes it."""

    def __init__(
        self,
        path: Path,
        group: GroupName,
        settings: StoreSettings,
        checksums: StoreChecksums,
        *,
        vocab_size: int | None = None,
    ) -> None:
        self.path = path
        self.group = group
        self.settings = settings
        self._digests = checksums.arrays(group)
        self._vocab_size = vocab_size
        self._reference_checksums: np.ndarray | None = None
        with damage(path / group):
            node: Any = zarr.open_group(path, mode="r", path=group, zarr_format=3)
            self._node = node
            self.sources = [SourceCounts(**entry) for entry in node.attrs["sources"]]
            self.index = StoreIndex(path / group, node, checksums, settings.pack_length)
            self._packs_in_chunk = {name: _check_plain(node[name], settings, path) for name in PER_TOKEN}
            packs = {name: node[name].shape[0] for name in PER_TOKEN}
            if any(count != len(self) for count in packs.values()):
                raise ValueError(f"{OFFSETS} has {len(self)} packs, the other arrays {packs}")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the group's settings, sources, columns and the checksums of its packs.

        A copy of the store at another path has the same digest.
        """
        settings = {
            item.name: getattr(self.settings, item.name)
            for item in dataclasses.fields(StoreSettings)
            if item.compare
        }
        # Without a template the entry is left out, so that stores of earlier versions keep their digest.
        sources = [
            {name: value for name, value in dataclasses.asdict(source).items() if value or name != "template"}
            for source in self.sources
        ]
        return sha256_of_json({"settings": settings, "sources": sources, "arrays": dict(self._digests)})

    def column(self, name: str) -> np.ndarray:
        """A whole per-segment column of `COLUMNS`, [segments].

        Raises `StoreError` if it differs from its checksum.
        """
        return self.index.column(name)

    def read(self, index: int) -> Pack:
        """Pack `index`, as new arrays. Raises `IndexError` beyond the end, and `StoreError` for damage."""
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {self.path}/{self.group}, which has {len(self)} packs")
        segments = slice(*(int(ends[0]) for ends in self.index.segments(np.array([index]))))
        padded, lengths = self.index.rows("padded", segments), self.index.rows("length", segments)
        sources = self.index.rows("source", segments)
        tail = self.settings.pack_length - int(padded.sum())
        padding = tail_lengths(tail, self.settings.segment_multiple)
        pack = Pack(
            tokens=self.read_row("tokens", index),
            roles=self.read_row("roles", index),
            cu_seqlens=np.cumsum([0, *padded.tolist(), *padding], dtype=np.int32),
            lengths=_with_tail(lengths, 0, len(padding)),
            sources=_with_tail(sources, -1, len(padding)),
            sample_ids=_with_tail(self.index.rows("sample", segments), 0, len(padding)),
            unit_ids=_with_tail(self.index.rows("unit", segments), -1, len(padding)),
            ranks=_with_tail(self.index.rows("rank", segments), -1, len(padding)),
            reference_logps=None if self._reference_checksums is None else self.read_row(REFERENCE, index),
        )
        possible = (
            tail >= 0
            and ((lengths >= 0) & (lengths <= padded)).all()
            and ((sources >= 0) & (sources < len(self.sources))).all()
        )
        if not possible:
            raise self._damaged(index, "its segments do not fit it or the store's sources")
        largest = np.iinfo(np.int32).max if self._vocab_size is None else self._vocab_size - 1
        if pack.tokens.min() < 0 or pack.tokens.max() > largest:
            raise self._damaged(index, f"it holds token ids that are not from 0 to {largest}")
        if pack.roles.max() > max(TokenRole):
            raise self._damaged(index, f"it holds the role {pack.roles.max()}, which does not exist")
        return pack

    def packs_in_chunk(self, name: str) -> int:
        """Packs in a chunk file of a per-token array."""
        return self._packs_in_chunk[name]

    def read_reference(self, key: str, roles: Sequence[str] = ()) -> None:
        """Let `read` add reference logps of these roles. Raises `StoreError` if their key or roles differ."""
        name = f"{self.path}/{self.group}"
        remedy = (
            f"run `megatron-post reference {self.path} --model DIR` with the model that training starts "
            "from, and training's own precision.dtype and precision.fp8"
        )
        if not self.has_reference:
            raise StoreError(f"store {name} has no reference log-probabilities; {remedy}")
        with damage(self.path / self.group / REFERENCE, remedy):
            array = self._node[REFERENCE]
            stored, held = str(array.attrs["key"]), list(array.attrs.get("trained_roles", roles))
            in_chunk = _check_plain(array, self.settings, self.path)
            checksums = np.fromfile(self.path / self.group / REFERENCE / CHECKSUMS, dtype="<u4")
            if len(checksums) == array.shape[0] and array_digest(checksums) != array.attrs[CHECKSUMS]:
                raise ValueError("the checksums of its packs are damaged")
        if stored != key or array.shape[0] != len(self) or len(checksums) != len(self):
            raise StoreError(
                f"the reference log-probabilities in store {name} are of another model, precision, tokenizer "
                f"or data (key {stored:.12}, {array.shape[0]} packs; wanted {key:.12}, "
                f"{len(self)} packs); {remedy}"
            )
        if not set(roles) <= set(held):
            raise StoreError(
                f"the reference log-probabilities in store {name} are of the roles {', '.join(held)}, and "
                f"dpo.trained_roles is {', '.join(roles)}; {remedy}, and its dpo.trained_roles"
            )
        self._packs_in_chunk[REFERENCE] = in_chunk
        self._reference_checksums = checksums

    @property
    def has_reference(self) -> bool:
        """Whether `megatron-post reference` has stored log-probabilities here, with any model."""
        return (self.path / self.group / REFERENCE).is_dir()

    @property
    def reference_key(self) -> str:
        """The key of the stored log-probabilities. Raises `StoreError` if it cannot be read."""
        with damage(self.path / self.group / REFERENCE):
            return str(self._node[REFERENCE].attrs["key"])

    def read_row(self, name: str, index: int) -> np.ndarray:
        """One pack of the per-token array `name`, [pack_length], after a comparison with its checksum."""
        chunk, row = divmod(index, self._packs_in_chunk[name])
        dtype, length = np.dtype(DTYPES[name]), self.settings.pack_length
        file = self.path / self.group / name / "c" / str(chunk) / "0"
        try:
            offset = row * length * dtype.itemsize
            values = np.fromfile(plain_file(file, "chunk"), dtype=dtype, count=length, offset=offset)
        except (OSError, ValueError) as error:
            raise StoreError(f"pack {index} of {self.path}/{self.group} cannot be read: {error}") from error
        if len(values) != length:
            raise self._damaged(index, f"{file} ends before the pack does")
        if crc32(values.tobytes()) != self._checksum_of(name, index):
            raise self._damaged(index, f"its {name} in {file} differ from their checksum")
        return values

    def _checksum_of(self, name: str, index: int) -> int:
        if name == REFERENCE:
            assert self._reference_checksums is not None
            return int(self._reference_checksums[index])
        return self.index.checksum(index, name)

    def _damaged(self, index: int, reason: str) -> StoreError:
        return StoreError(
            f"pack {index} of {self.path}/{self.group} is damaged: {reason}; run `megatron-post data pack` "
            "again (or start again, if the store was replaced while it was in use)"
        )

    def empty(self) -> Pack:
        """A pack of padding, which has no weight in a loss. Ranks that have run out of packs use it."""
        return pack_of_segments([], pack_length=self.settings.pack_length, pad_id=self.settings.pad_id)


def open_store(
    path: str | Path,
    group: GroupName,
    *,
    pack_length: int | None = None,
    segment_multiple: int = 1,
    tokenizer_fingerprint: str | None = None,
    layout: str | None = None,
    reasoning: str | None = None,
    vocab_size: int | None = None,
) -> PackStore:
    """Open a group for reading. The store must match every argument that is not None.

    segment_multiple: the store's multiple must be divisible by it. vocab_size: all token ids that are read
    must be smaller. Raises `StoreError` if there is no complete store, if it is damaged, or if it was packed
    with another length, tokenizer, layout or `data.reasoning`.
    """
    path = Path(path)
    settings = read_settings(path)
    with damage(path):
        plain_files(path, unseen="c")  # zarr would block forever on a named pipe
    checksums = read_checksums(path)
    remedy = "run `megatron-post data pack` with this config (--overwrite, or another data.store)"
    if pack_length not in (None, settings.pack_length):
        raise StoreError(
            f"store {path} has packs of {settings.pack_length} tokens, data.pack_length is {pack_length}; "
            f"{remedy}"
        )
    if settings.segment_multiple % segment_multiple:
        raise StoreError(
            f"store {path} has segments padded to multiples of {settings.segment_multiple}, this layout "
            f"needs {segment_multiple} (2 x parallel.context); {remedy}"
        )
    if tokenizer_fingerprint not in (None, settings.tokenizer_fingerprint):
        raise StoreError(
            f"store {path} was made with tokenizer {settings.tokenizer_fingerprint:.12} and "
            f"content_tokens={list(settings.content_tokens)}, tokenizer.path and tokenizer.content_tokens "
            f"give {tokenizer_fingerprint:.12}; {remedy}"
        )
    if layout not in (None, settings.layout):
        raise StoreError(
            f"store {path} holds examples as {settings.layout!r}, this stage needs {layout!r}; {remedy}"
        )
    if reasoning not in (None, settings.reasoning):
        raise StoreError(
            f"store {path} was packed with data.reasoning={settings.reasoning}, and now it is {reasoning}: "
            f"the exported chat template would differ from the data; {remedy}"
        )
    return PackStore(path, group, settings, checksums, vocab_size=vocab_size)


def _check_plain(array: Any, settings: StoreSettings, path: Path) -> int:
    """The number of packs in a chunk file. Raises `StoreError` if the array is not stored as plain bytes."""
    length = settings.pack_length
    plain = not array.compressors and not array.filters and array.shards is None and array.shape[1] == length
    if not plain or array.chunks[1] != length or array.dtype != DTYPES[array.basename]:
        raise StoreError(
            f"store {path}: array {array.path} is compressed, sharded or of another shape than `data pack` "
            "writes; run `megatron-post data pack` again"
        )
    return int(array.chunks[0])


def _with_tail(values: np.ndarray, fill: int, count: int) -> np.ndarray:
    return np.append(values, np.full(count, fill, values.dtype))
