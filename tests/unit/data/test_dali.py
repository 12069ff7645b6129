"""The loader with NVIDIA DALI gives the batches of the plain loader."""

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_post.data.dali import DaliLoader
from megatron_post.data.loader import PackLoader
from megatron_post.data.pack import Pack
from megatron_post.data.store import PackStore
from tests.unit.data.small_store import small_store

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def store(tmp_path: Path) -> PackStore:
    return small_store(tmp_path / "s", 7)


def plain(store: PackStore) -> PackLoader:
    return PackLoader(store, seed=3, global_batch=4, data_rank=1, data_size=2, consumed_packs=4)


@pytest.mark.parametrize("device_id", [None, pytest.param(0, marks=needs_gpu)])
def test_the_same_batches(store: PackStore, device_id: int | None) -> None:
    pytest.importorskip(
        "nvidia.dali", reason="NVIDIA DALI is not installed (pip install megatron-post[dali])"
    )
    with plain(store) as expected, DaliLoader(plain(store), device_id=device_id, prefetch=3) as loader:
        # take all before comparing any, so that a view of a buffer that DALI reuses would show wrong values
        steps = list(islice(loader, 9))
        for packs, others in zip(steps, expected, strict=False):
            assert len(packs) == 2
            for pack, other in zip(packs, others, strict=True):
                for name in set(Pack.__slots__) - {"reference_logps"}:
                    got, wanted = getattr(pack, name), getattr(other, name)
                    if device_id is not None and name in ("tokens", "roles"):
                        assert got.is_cuda
                        got = got.cpu().numpy()
                    assert got.dtype == wanted.dtype
                    assert np.array_equal(got, wanted), name


def test_arrays_can_be_handed_to_torch(store: PackStore) -> None:
    pytest.importorskip(
        "nvidia.dali", reason="NVIDIA DALI is not installed (pip install megatron-post[dali])"
    )
    with DaliLoader(plain(store)) as loader:
        pack = next(loader)[0]
    assert torch.from_numpy(pack.tokens).dtype == torch.int32


def test_without_dali_the_remedy_is_named(store: PackStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with plain(store) as loader, pytest.raises(ValueError, match=r"pip install .*\[dali\]"):
        DaliLoader(loader)
