"""The store: what is written is read, plain zarr reads it too, and it is complete or not there."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from megatron_post.data import store_writer
from megatron_post.data.store import StoreError, open_store
from megatron_post.data.store_writer import StoreWriter
from tests.unit.data.small_store import SETTINGS, small_store, tokens_of, write_packs


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packs a chunk file, so that seven packs are three files."""
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
    # the tail of padding is a segment of its own, never part of the last one
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


def test_append_adds_packs_and_leaves_the_others(tmp_path: Path, small_chunks: None) -> None:
    before = small_store(tmp_path / "s", 7)
    with StoreWriter(tmp_path / "s", SETTINGS, append=True) as writer:
        write_packs(writer, 4, names=("c", "d"))
    store = open_store(tmp_path / "s", "train")
    assert len(store) == 11
    for p in range(7):
        for name in ("tokens", "roles", "cu_seqlens", "sources", "sample_ids", "unit_ids"):
            assert np.array_equal(getattr(store.read(p), name), getattr(before.read(p), name))
    added = store.read(7 + 1)
    assert np.array_equal(added.tokens, tokens_of(1))
    assert [store.sources[number].name for number in added.sources] == ["c", "d"]
    assert len(np.unique(store.column("unit"))) == len(store.column("unit"))


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
    with pytest.raises(StoreError, match="no packed store"):
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
    with pytest.raises(StoreError, match="format version 0, this program reads 1"):
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
    with pytest.raises(StoreError, match="is damaged: it ends in pack 1"):
        store.read(1)
    file.unlink()
    with pytest.raises(StoreError, match=r"pack 0 .* cannot be read"):
        store.read(0)


def test_compressed_arrays_are_refused(tmp_path: Path) -> None:
    small_store(tmp_path / "s", 2)
    group: Any = zarr.open_group(tmp_path / "s/train", mode="r+")
    group.create_array("tokens", shape=(2, 16), chunks=(2, 16), dtype="<i4", overwrite=True)
    with pytest.raises(StoreError, match="is compressed"):
        open_store(tmp_path / "s", "train")
