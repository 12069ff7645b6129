"""A store returns what was written, plain zarr can read it, and an incomplete store is never visible."""

import dataclasses
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from rich.console import Console

from megatron_post.data import store_columns, store_writer
from megatron_post.data.check_store import check_store
from megatron_post.data.pack import pack_of_segments, tail_lengths
from megatron_post.data.store import open_store
from megatron_post.data.store_checksums import StoreError
from megatron_post.data.store_format import COLUMNS, GROUPS
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import Rendered
from megatron_post.storage.checksums import sha256_of_json
from tests.unit.data.small_store import SETTINGS, seal, small_store, tokens_of, write_packs


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put three packs in a chunk file, so that seven packs need three files."""
    monkeypatch.setattr(store_writer, "_MIN_CHUNK_TOKENS", 16)
    monkeypatch.setattr(store_writer, "_MAX_CHUNK_TOKENS", 48)


def test_reads_what_was_written(tmp_path: Path, small_chunks: None) -> None:
    store = small_store(tmp_path / "s", 7)
    assert len(list((tmp_path / "s/train/tokens/c").iterdir())) == 3
    assert len(store) == 7
    for p in range(7):
        pack = store.read(p)
        assert pack.tokens.dtype == np.int32
        assert np.array_equal(pack.tokens, tokens_of(p))
        assert np.array_equal(pack.roles, np.full(16, p % 5, dtype=np.uint8))
    even, odd = store.read(2), store.read(3)
    # the padding at the end is a segment of its own, and not a part of the last one
    assert even.cu_seqlens.tolist() == [0, 8, 16]
    assert even.cu_seqlens.dtype == np.int32
    assert (even.sources.tolist(), even.sample_ids.tolist(), even.unit_ids.tolist()) == (
        [0, -1],
        [200, 0],
        [3, -1],
    )
    assert odd.cu_seqlens.tolist() == [0, 8, 16]
    assert (odd.sources.tolist(), odd.sample_ids.tolist(), odd.unit_ids.tolist()) == (
        [0, 1],
        [300, 301],
        [4, 5],
    )
    assert [counts.name for counts in store.sources] == ["a", "b"]


def test_plain_zarr_reads_the_same(tmp_path: Path, small_chunks: None) -> None:
    store = small_store(tmp_path / "s", 7)
    group: Any = zarr.open_group(tmp_path / "s", mode="r")
    assert group["train/tokens"].shape == (7, 16)
    assert group.metadata.zarr_format == 3
    for p in range(7):
        assert np.array_equal(group["train/tokens"][p], store.read(p).tokens)
        assert np.array_equal(group["train/roles"][p], store.read(p).roles)


def test_a_group_without_packs_is_there_and_empty(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    assert len(open_store(tmp_path / "s", "eval")) == 0


def test_the_empty_pack_is_padding_alone(tmp_path: Path) -> None:
    pack = small_store(tmp_path / "s", 1).empty()
    assert (pack.tokens == 99).all()
    assert not pack.roles.any()
    assert pack.cu_seqlens.tolist() == [0, 16]


def test_padding_at_the_end_is_short_segments() -> None:
    """300 tokens of padding are segments of 128, 128 and 44. A multiple of 48 makes them 144, 144 and 12.

    As one causal segment they would cost 300^2 instead of 2 x 128^2 + 44^2.
    """
    assert tail_lengths(300, 1) == tail_lengths(300, 4) == [128, 128, 44]
    assert tail_lengths(300, 48) == [144, 144, 12]
    assert tail_lengths(0, 4) == []
    pack = pack_of_segments([Rendered(np.ones(3, np.int32), np.ones(3, np.uint8))], pack_length=304)
    assert np.diff(pack.cu_seqlens).tolist() == [3, 128, 128, 45]
    assert pack.lengths.tolist() == [3, 0, 0, 0] and pack.unit_ids.tolist() == [0, -1, -1, -1]


def test_append_adds_packs_and_leaves_the_others(tmp_path: Path, small_chunks: None) -> None:
    opened = small_store(tmp_path / "s", 7)
    before = [opened.read(p) for p in range(7)]
    with StoreWriter(tmp_path / "s", SETTINGS, append=True) as writer:
        write_packs(writer, 4, names=("c", "d"))
    store = open_store(tmp_path / "s", "train")
    assert len(store) == 11
    for p in range(7):
        for name in ("tokens", "roles", "cu_seqlens", "sources", "sample_ids", "unit_ids"):
            assert np.array_equal(getattr(store.read(p), name), getattr(before[p], name))
        assert np.array_equal(opened.read(p).tokens, before[p].tokens), "a reader keeps what it had opened"
    added = store.read(7 + 1)
    assert np.array_equal(added.tokens, tokens_of(1))
    assert [store.sources[number].name for number in added.sources] == ["c", "d"]
    assert len(np.unique(store.column("unit"))) == len(store.column("unit"))


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("killed_at", ["never", "copied", "written"])
def test_append_shares_full_chunks(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch, links: bool, killed_at: str
) -> None:
    """Seven packs are two full chunks and one with room, which is copied. A kill changes nothing.

    The appended store has the same bytes with links, without them, and if an earlier writer was killed.
    "plain" is appended with links.
    """
    small_store(tmp_path / "s", 7)
    before = files_of(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "plain")
    chunks = {str(n): (tmp_path / f"s/train/tokens/c/{n}/0").stat().st_ino for n in range(3)}
    link = os.link

    def refuse(source: Any, target: Any) -> None:
        if Path(source).is_relative_to(tmp_path / "s") and not links:
            raise PermissionError("this file system has no links")
        link(source, target)  # zarr needs links of its own

    monkeypatch.setattr(os, "link", refuse)
    if killed_at != "never":
        if (child := os.fork()) == 0:
            with StoreWriter(tmp_path / "s", SETTINGS, append=True) as writer:
                if killed_at == "written":
                    write_packs(writer, 4, names=("c", "d"))
                os._exit(0)
        os.waitpid(child, 0)
        assert files_of(tmp_path / "s") == before
    for name in ("s", "plain"):
        with StoreWriter(tmp_path / name, SETTINGS, append=True) as writer:
            write_packs(writer, 4, names=("c", "d"))
    assert files_of(tmp_path / "s") == files_of(tmp_path / "plain")
    for n, inode in chunks.items():
        file = tmp_path / f"s/train/tokens/c/{n}/0"
        assert (file.stat().st_ino == inode) == (links and n != "2"), n
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plain", "s"]


def as_earlier_version(store: Path) -> None:
    """Compress the columns into chunks, without checksums of blocks, as versions before did."""
    root: Any = zarr.open_group(store, mode="r+")
    for group in GROUPS:
        names = ["segment_offsets", "checksums", *(f"segment/{name}" for name in COLUMNS)]
        for name in names:
            root[group].create_array(name, data=root[group][name][:], chunks="auto", overwrite=True)
    seal(store, only_metadata=True)
    content = json.loads((store / "checksums.json").read_text())
    del content["blocks"], content["sha256"]
    (store / "checksums.json").write_text(json.dumps({"sha256": sha256_of_json(content), **content}))


def test_a_store_of_compressed_columns_is_read_and_extended(tmp_path: Path) -> None:
    """A run that was started with such a store goes on, because packs and digest are the same."""
    small_store(tmp_path / "s", 7)
    expected = contents(tmp_path / "s")
    as_earlier_version(tmp_path / "s")
    assert contents(tmp_path / "s") == expected
    check_store(tmp_path / "s", console=console())
    small_store(tmp_path / "new", 7)
    for name in ("s", "new"):
        with StoreWriter(tmp_path / name, SETTINGS, append=True) as writer:
            write_packs(writer, 4, names=("c", "d"))
    assert contents(tmp_path / "s") == contents(tmp_path / "new")
    assert set(files_of(tmp_path / "s")) == set(files_of(tmp_path / "new"))


def test_only_the_blocks_in_use_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of two rows, damage to the last of ten segments is found when the last pack is read.

    Opening the store and reading other packs touch other blocks.
    """
    monkeypatch.setattr(store_columns, "BLOCK", 2)
    small_store(tmp_path / "s", 7)
    file = tmp_path / "s/train/segment/sample/c/0"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    store = open_store(tmp_path / "s", "train")
    for pack in range(5):
        store.read(pack)
    with pytest.raises(StoreError, match=r"segment/sample differs from its checksum in row 8 or after it"):
        store.read(6)
    with pytest.raises(StoreError, match="segment/sample differs from its checksum"):
        store.column("sample")


def test_checksums_of_another_number_of_blocks(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    content = json.loads((tmp_path / "s/checksums.json").read_text())
    for digits, message in (("", "has 1 blocks and 0 checksums"), ("zz", "not an intact part")):
        content["blocks"]["train"]["segment_offsets"] = digits
        content.pop("sha256", None)
        (tmp_path / "s/checksums.json").write_text(json.dumps({"sha256": sha256_of_json(content), **content}))
        with pytest.raises(StoreError, match=message):
            open_store(tmp_path / "s", "train")


def test_append_refuses_a_source_that_is_there(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    with (
        pytest.raises(StoreError, match=r"already has the source\(s\) b"),
        StoreWriter(tmp_path / "s", SETTINGS, append=True) as writer,
    ):
        write_packs(writer, 4, names=("c", "b"))
    assert len(open_store(tmp_path / "s", "train")) == 2


def test_append_refuses_other_settings(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    other = dataclasses.replace(SETTINGS, seed=2, tokenizer_path="moved")
    with pytest.raises(StoreError, match=r"was made with seed=1 \(now 2\); packs of other settings"):
        StoreWriter(tmp_path / "s", other, append=True)


def test_an_existing_store_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    with pytest.raises(StoreError, match=r"exists; give --append .* --overwrite"):
        StoreWriter(tmp_path / "s", SETTINGS)
    with StoreWriter(tmp_path / "s", SETTINGS, overwrite=True) as writer:
        write_packs(writer, 3)
    assert len(open_store(tmp_path / "s", "train")) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("content", [None, "{}", '{"attributes": {"format": "images"}}'])
def test_what_is_no_store_is_never_replaced(tmp_path: Path, content: str | None) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    if content:
        (home / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="not a packed store"):
        StoreWriter(home, SETTINGS, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("mode", ["new", "overwrite", "append"])
def test_a_failed_build_leaves_what_was_there(tmp_path: Path, mode: str) -> None:
    if mode != "new":
        small_store(tmp_path / "s", 2)
    with (
        pytest.raises(RuntimeError, match="disk"),
        StoreWriter(
            tmp_path / "s", SETTINGS, overwrite=mode == "overwrite", append=mode == "append"
        ) as writer,
    ):
        write_packs(writer, 5, names=("c", "d"))
        assert mode == "new" or len(open_store(tmp_path / "s", "train")) == 2
        raise RuntimeError("disk")
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if mode == "new" else ["s"])
    if mode != "new":
        assert len(open_store(tmp_path / "s", "train")) == 2


def test_a_store_of_another_version_can_be_overwritten_but_not_read(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 1)
    text = json.loads((tmp_path / "s/zarr.json").read_text())
    text["attributes"]["version"] = 0
    (tmp_path / "s/zarr.json").write_text(json.dumps(text))
    with pytest.raises(StoreError, match="format version 0, this program reads 2"):
        open_store(tmp_path / "s", "train")
    with StoreWriter(tmp_path / "s", SETTINGS, overwrite=True) as writer:
        write_packs(writer, 3)
    assert len(open_store(tmp_path / "s", "train")) == 3


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"pack_length": 32}, "packs of 16 tokens, data.pack_length is 32"),
        ({"segment_multiple": 8}, "multiples of 4, this layout needs 8"),
        ({"tokenizer_fingerprint": "0" * 64}, "was made with tokenizer ffffffffffff"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_with_the_remedy(
    tmp_path: Path, needs: Any, message: str
) -> None:
    small_store(tmp_path / "s", 1)
    with pytest.raises(StoreError, match=f"{message}.*megatron-post data pack"):
        open_store(tmp_path / "s", "train", **needs)


def test_a_store_that_fits_is_opened(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 1)
    for multiple in (1, 2, 4):
        open_store(
            tmp_path / "s", "train", pack_length=16, segment_multiple=multiple, tokenizer_fingerprint="f" * 64
        )


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store; run `megatron-post data pack` first"):
        open_store(tmp_path / "s", "train")


def test_damage_is_an_error_with_the_file(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s", 2)
    file = next((tmp_path / "s/train/tokens").rglob("c/0/0"))
    file.write_bytes(file.read_bytes()[:100])  # pack 0 takes 64 bytes, pack 1 is cut
    store.read(0)
    with pytest.raises(StoreError, match=r"pack 1 .* is damaged: .* ends before the pack does"):
        store.read(1)
    file.unlink()
    with pytest.raises(StoreError, match=r"pack 0 .* cannot be read"):
        store.read(0)


def test_compressed_arrays_are_refused(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    group: Any = zarr.open_group(tmp_path / "s/train", mode="r+")
    group.create_array("tokens", shape=(2, 16), chunks=(2, 16), dtype="<i4", overwrite=True)
    with pytest.raises(StoreError, match=r"tokens/zarr\.json differs from its checksum"):
        open_store(tmp_path / "s", "train")
    seal(tmp_path / "s")
    with pytest.raises(StoreError, match="is compressed"):
        open_store(tmp_path / "s", "train")


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def contents(path: Path) -> list[list[object]]:
    """All data of both groups that training reads from a store."""
    stores = [open_store(path, group) for group in GROUPS]
    packs = [store.read(index) for store in stores for index in range(len(store))]
    fields = [
        getattr(pack, name) for pack in packs for name in ("tokens", "roles", "cu_seqlens", "sample_ids")
    ]
    columns = [store.column(name) for store in stores for name in COLUMNS]
    return [[store.digest for store in stores], *(values.tolist() for values in [*fields, *columns])]


def test_every_damaged_byte_is_found(
    tmp_path: Path, small_chunks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file of a store gets a flipped bit, zeros in a part, a missing end, or is deleted.

    Six packs fill two chunk files completely, so every byte of these files belongs to a pack.
    """
    small_store(tmp_path / "s", 6)
    intact = contents(tmp_path / "s")
    files = [file for file in (tmp_path / "s").rglob("*") if file.is_file()]
    count, harmless, draw = 0, 0, random.Random(1)
    for file in files:
        content = file.read_bytes()
        flips = sorted({0, len(content) - 1, *draw.sample(range(len(content)), min(12, len(content)))})
        damaged = [
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :] for at in flips
        ]
        middle = len(content) // 2
        damaged += [content[:middle], content[:middle] + bytes(len(content) - middle), None]
        for bad in damaged:
            file.unlink() if bad is None else file.write_bytes(bad)
            count += 1
            try:
                check_store(tmp_path / "s", console=console())
                # for example a missing chunk, which zarr reads as zeros, or a bit that zstd does not use
                assert contents(tmp_path / "s") == intact, f"{file} was damaged and nothing noticed"
                harmless += 1
            except StoreError:
                with pytest.raises(StoreError):
                    contents(tmp_path / "s")
            file.write_bytes(content)
    assert contents(tmp_path / "s") == intact
    with capsys.disabled():
        print(
            f"\n{count} damages to {len(files)} files of a store: {harmless} change no value, the rest found"
        )
    assert count > 500 and harmless < count / 20


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("segment_offsets", [0, 4, 3], "does not start at 0 and grow"),
        ("segment_offsets", [1, 2, 3], "does not start at 0 and grow"),
        ("segment_offsets", [0, 1], "has 1 packs, the other arrays"),
        ("segment_offsets", [0, 1, 4], "has 3 rows for 4 segments"),
        ("segment/padded", [8, 16, 8], "pack 1 .* its segments do not fit it"),
        ("segment/length", [9, 5, 5], "pack 0 .* its segments do not fit it"),
        ("segment/length", [-1, 5, 5], "pack 0 .* its segments do not fit it"),
        ("segment/source", [0, 2, 0], "pack 1 .* or the store's sources"),
        ("tokens", [[250] * 16] * 2, "token ids that are not from 0 to 249"),
        ("tokens", [[-1] * 16] * 2, "token ids that are not from 0 to 249"),
        ("roles", [[77] * 16] * 2, "role 77"),
    ],
)
def test_impossible_values_with_right_checksums_are_refused(
    tmp_path: Path, name: str, values: list, message: str
) -> None:
    """A person or program that can write a store can also write matching checksums."""
    small_store(tmp_path / "s", 2, tokens=np.zeros(16, dtype=np.int32))
    node: Any = zarr.open_group(tmp_path / "s", mode="r+", path="train")
    node[name].resize((len(values), *node[name].shape[1:]))
    node[name][:] = np.array(values)
    seal(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        store = open_store(tmp_path / "s", "train", vocab_size=250)
        for index in range(2):
            store.read(index)


def test_metadata_cannot_name_a_codec_that_loads_objects(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    file = tmp_path / "s/train/segment/padded/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    file.write_text(json.dumps(metadata))
    seal(tmp_path / "s", only_metadata=True)
    with pytest.raises(StoreError, match=r"numcodecs\.pickle.*not allowed here"):
        open_store(tmp_path / "s", "train")


def test_the_digest_is_the_contents(tmp_path: Path) -> None:
    """The digest is the same at another path and if the store is written again.

    It differs for another token, source or setting.
    """
    first = small_store(tmp_path / "a", 3)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert (
        first.digest
        == small_store(tmp_path / "b", 3).digest
        == open_store(tmp_path / "moved", "train").digest
    )
    others = [
        small_store(tmp_path / "c", 3, tokens=np.zeros(16, dtype=np.int32)),
        small_store(tmp_path / "d", 4),
    ]
    with StoreWriter(tmp_path / "e", dataclasses.replace(SETTINGS, seed=9)) as writer:
        write_packs(writer, 3)
    with StoreWriter(tmp_path / "f", SETTINGS) as writer:
        write_packs(writer, 3, names=("a", "c"))
    others += [open_store(tmp_path / name, "train") for name in ("e", "f")]
    assert len({first.digest, *(store.digest for store in others)}) == 5


def test_appending_to_a_damaged_store_is_refused(tmp_path: Path) -> None:
    """Appending would write new and valid checksums for the damaged data."""
    small_store(tmp_path / "s", 2)
    chunk = tmp_path / "s/train/segment/length/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with (
        pytest.raises(StoreError, match=r"segment/length|intact"),
        StoreWriter(tmp_path / "s", SETTINGS, append=True),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_two_writers_at_once(tmp_path: Path) -> None:
    """The second writer gets an error that names the first, and it does not change the first one's files."""
    with StoreWriter(tmp_path / "s", SETTINGS) as writer:
        with (
            pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on "),
            StoreWriter(tmp_path / "s", SETTINGS),
        ):
            pass
        write_packs(writer, 2)
    assert len(open_store(tmp_path / "s", "train")) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("renames", [0, 1])
def test_a_writer_killed_when_it_replaces_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, renames: int
) -> None:
    """The writer is killed after a given number of renames.

    Then there is a store at the path, or the reader's error names the earlier store. The next writer restores
    it and removes the remaining files.
    """
    small_store(tmp_path / "s", 2)
    child = os.fork()
    if child == 0:
        done, rename = 0, os.rename

        def dying(*names: Any) -> None:
            nonlocal done
            if done == renames:
                os._exit(0)
            done += 1
            rename(*names)

        os.rename = dying
        if not exchanges:
            store_writer._exchange = lambda a, b: False
        with StoreWriter(tmp_path / "s", SETTINGS, overwrite=True) as writer:
            write_packs(writer, 3)
        os._exit(0)
    os.waitpid(child, 0)
    if not exchanges and renames == 1:
        with pytest.raises(StoreError, match=r"was interrupted .*\.replaced"):
            open_store(tmp_path / "s", "train")
    else:
        assert len(open_store(tmp_path / "s", "train")) == (3 if exchanges else 2)
    with StoreWriter(tmp_path / "s", SETTINGS, append=True) as writer:
        assert len(open_store(tmp_path / "s", "train")) == (3 if exchanges else 2)
        write_packs(writer, 1, names=("c", "d"))
    assert len(open_store(tmp_path / "s", "train")) == (4 if exchanges else 3), "nothing of before is lost"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_store_that_was_put_back_is_not_replaced_unasked(tmp_path: Path) -> None:
    """An interrupted replacement leaves the earlier store under another name.

    Recovery restores it. After that it needs --overwrite again, as every existing store does.
    """
    small_store(tmp_path / "s", 2)
    (tmp_path / "s").rename(tmp_path / ".s.123.replaced")
    with pytest.raises(StoreError, match="exists; give --append"), StoreWriter(tmp_path / "s", SETTINGS):
        pass
    assert len(open_store(tmp_path / "s", "train")) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_stores_with_similar_names_leave_each_other_alone(tmp_path: Path) -> None:
    """The files of a writer of `s.v2` begin like those of `s`, and a name may hold characters of patterns."""
    with StoreWriter(tmp_path / "s.v2", SETTINGS) as other:
        small_store(tmp_path / "s", 2)
        write_packs(other, 3)
    (tmp_path / "s.v2").rename(tmp_path / ".s.v2.123.replaced")
    with pytest.raises(StoreError, match="there is no store; run"):
        open_store(tmp_path / "t", "train")
    small_store(tmp_path / "[s]", 1)
    with StoreWriter(tmp_path / "s", SETTINGS, overwrite=True) as writer:
        write_packs(writer, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".s.v2.123.replaced", "[s]", "s"]
