"""With DALI on a GPU the packs are those of the plain loader, in whatever order the GPU runs its work.

The tests use stand-ins for DALI and for the GPU. The stand-in for DALI has the default execution model of
DALI 2.4, as its sources and docstrings describe it. It copies packs ahead into buffers of a pool, on a stream
of its own. The host waits until a pack has been copied. A buffer is free as soon as nothing holds it.
"""

import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from megatron_post.data.dali import DaliLoader
from megatron_post.data.loader import PackLoader
from megatron_post.data.store import PackStore
from tests.fake_streams import FakeDevice, FakeEvent, FakeStream, fake_streams
from tests.unit.data.small_store import small_store

SEEDS = range(12)


class _Node:
    def gpu(self) -> Self:
        return self


class _Pipeline:
    """The part of NVIDIA DALI's `Pipeline` that the loader uses."""

    def __init__(
        self, device: FakeDevice, *, prefetch_queue_depth: int, exec_dynamic: bool, **_: Any
    ) -> None:
        assert exec_dynamic  # other execution models overwrite buffers that are still held
        self._device, self._own, self._depth = device, FakeStream(device), prefetch_queue_depth
        self._source: Iterator[tuple[list[np.ndarray], ...]] = iter(())
        self._free: list[np.ndarray] = []
        self._ahead: deque[list[tuple[np.ndarray, np.ndarray]]] = deque()
        self._done: deque[FakeEvent] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def external_source(self, *, source: Any, num_outputs: int, no_copy: bool, **_: Any) -> list[_Node]:
        assert not no_copy
        self._source = source
        return [_Node()] * num_outputs

    def set_outputs(self, *_: _Node) -> None:
        pass

    def build(self) -> None:
        pass

    def run(self) -> list[list[np.ndarray]]:
        while len(self._ahead) <= self._depth:
            self._ahead.append([self._copied(array) for (array,) in next(self._source)])
            self._done.append(self._own.record_event())
        done = self._done.popleft()
        self._device.run_until(lambda: done.happened)
        outputs = []
        for buffer, content in self._ahead.popleft():
            weakref.finalize(content, self._free.append, buffer).atexit = False
            outputs.append([content])
            del content
        return outputs

    def _copied(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A buffer and the view of it that will hold the array."""
        buffer = self._free.pop() if self._free else np.zeros(1024, np.uint8)
        held = array.copy()  # the copy to pinned memory is synchronous
        self._own.launch(lambda: buffer[: held.nbytes].__setitem__(slice(None), held.view(np.uint8)))
        return buffer, buffer[: held.nbytes].view(held.dtype)


def _install(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    """Install the stand-in for `nvidia.dali`."""
    made: list[_Pipeline] = []

    class Pipeline(_Pipeline):
        def __init__(self, *, exec_dynamic: bool, **settings: Any) -> None:
            super().__init__(device, exec_dynamic=exec_dynamic, **settings)
            made.append(self)

    fake = types.ModuleType("nvidia.dali")
    fake.Pipeline = Pipeline  # type: ignore[attr-defined]
    fake.fn = types.SimpleNamespace(external_source=lambda **settings: made[-1].external_source(**settings))  # type: ignore[attr-defined]
    fake.types = types.SimpleNamespace(INT32="INT32", UINT8="UINT8")  # type: ignore[attr-defined]
    nvidia = types.ModuleType("nvidia")
    nvidia.dali = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia", nvidia)
    monkeypatch.setitem(sys.modules, "nvidia.dali", fake)


def _is_right(store: PackStore, device: FakeDevice) -> bool:
    """Whether seven steps, all taken before the GPU runs, have the contents of the plain loader."""

    def plain() -> PackLoader:
        return PackLoader(store, seed=3, global_batch=4, data_rank=1, data_size=2, consumed_packs=4)

    with plain() as expected, DaliLoader(plain(), device_id=0, prefetch=2) as loader:
        taken = [pack for packs in islice(loader, 7) for pack in packs]
        device.synchronize()
        wanted = [pack for packs in islice(expected, 7) for pack in packs]
    for pack, other in zip(taken, wanted, strict=True):
        assert np.array_equal(pack.lengths, other.lengths)
        # The host reads these, and on the device it would wait for all work that was launched before.
        for name in ("cu_seqlens", "roles"):
            assert isinstance(getattr(pack, name), np.ndarray)
            assert np.array_equal(getattr(pack, name), getattr(other, name))
        moved: Any = pack.tokens
        assert isinstance(moved, torch.Tensor)
        if not np.array_equal(moved.numpy(), other.tokens):
            return False
    return True


@pytest.fixture
def store(tmp_path: Path) -> PackStore:
    return small_store(tmp_path / "s", 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_packs_are_right_in_any_order_of_work(
    store: PackStore, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with fake_streams(seed) as device:
        _install(monkeypatch, device)
        assert _is_right(store, device)


def test_the_host_does_not_wait_for_the_step_before(
    store: PackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of a step are taken while the GPU still updates the weights, however long that takes."""
    with fake_streams(0) as device:
        _install(monkeypatch, device)
        update = FakeEvent(device)
        update.happened = False
        device.current.wait_event(update)
        loader = PackLoader(store, seed=3, global_batch=4, consumed_packs=4)
        with DaliLoader(loader, device_id=0) as dali:
            taken = [*next(dali), *next(dali)]
        update.happened = True
        device.synchronize()
    with PackLoader(store, seed=3, global_batch=4, consumed_packs=4) as plain:
        for pack, other in zip(taken, [*next(plain), *next(plain)], strict=True):
            assert np.array_equal(np.asarray(pack.tokens), other.tokens)


@pytest.mark.parametrize("forgotten", ["_hold", "query"])
def test_a_buffer_that_is_let_go_too_early_is_overwritten(
    store: PackStore, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The first test notices a loader that holds no buffer, and one to which every copy seems complete."""
    owner = DaliLoader if forgotten == "_hold" else FakeEvent
    monkeypatch.setattr(owner, forgotten, lambda self, *_: True)
    found = []
    for seed in SEEDS:
        with fake_streams(seed) as device, monkeypatch.context() as patch:
            _install(patch, device)
            found.append(_is_right(store, device))
    assert not all(found)


def test_an_older_dali_is_refused(store: PackStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_streams(0) as device:
        _install(monkeypatch, device)
        fake = sys.modules["nvidia.dali"]
        fake.__version__ = "1.44.0"  # type: ignore[attr-defined]
        monkeypatch.setattr(fake, "Pipeline", lambda batch_size, num_threads: None)
        loader = PackLoader(store, seed=3, global_batch=4, data_rank=1, data_size=2, consumed_packs=4)
        with loader, pytest.raises(ValueError, match=r"DALI 1\.44\.0 reuses .* 1\.53.*\[dali\]"):
            DaliLoader(loader, device_id=0)
