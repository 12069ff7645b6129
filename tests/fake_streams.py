"""CUDA streams on a CPU that run their work late, and in any order that the events allow.

Work that is launched on a stream waits in the stream's queue. From time to time the device runs some of the
work that is ready, in an order drawn from a seed. The first item of a queue is ready unless it waits for an
event that has not happened. A host that synchronizes runs ready work until its stream or event is done. A
copy reads and writes addresses when it runs. As on a GPU it does not keep memory alive, and it copies
whatever was written there in the meantime. So a test must keep the memory until the device is synchronized.

`Tensor.clone` and `Tensor.copy_` are launched. Every other operation runs at once, on the host. `pin_memory`
is ignored.
"""

import contextlib
import ctypes
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Work = Callable[[], object]


class FakeEvent:
    """An event that has happened once all work has run that was on the stream when it was recorded."""

    def __init__(self, device: "FakeDevice", *_: Any, **__: Any) -> None:
        self._device, self.happened = device, True

    def record(self, stream: "FakeStream | None" = None) -> None:
        (stream or self._device.current).record_event(self)

    def wait(self, stream: "FakeStream | None" = None) -> None:
        (stream or self._device.current).wait_event(self)

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.happened)


class FakeStream:
    """A stream. Its own work runs in order."""

    def __init__(self, device: "FakeDevice", *_: Any, **__: Any) -> None:
        self._device, self.speed = device, device.draw_speed()
        self.queue: list[FakeEvent | Work] = []  # the stream waits for an event in its queue
        device.streams.append(self)

    def launch(self, work: Work) -> None:
        with self._device.lock:
            self.queue.append(work)
        self._device.run_some()

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._device)
        event.happened = False
        self.launch(lambda: setattr(event, "happened", True))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        with self._device.lock:
            self.queue.append(event)

    def wait_stream(self, stream: "FakeStream") -> None:
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        return not self.queue

    def synchronize(self) -> None:
        self._device.run_until(lambda: not self.queue)


class FakeDevice:
    """A device that draws the order of its work from `seed`."""

    def __init__(self, seed: int) -> None:
        self.lock = threading.RLock()
        self.streams: list[FakeStream] = []
        self._random = random.Random(seed)
        self._default = FakeStream(self)
        self._local = threading.local()  # as in torch, each thread has its own current stream

    def draw_speed(self) -> float:
        """Draw the weight with which a stream is chosen. A stream may fall far behind the others."""
        return self._random.choice((1.0, 0.3, 0.02))

    @property
    def current(self) -> FakeStream:
        return getattr(self._local, "stream", self._default)

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Within this context `stream` is this thread's current stream."""
        outer, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = outer

    def run_some(self) -> None:
        """Run none, some or much of the ready work, as a device may do at any time."""
        with self.lock:
            speeds = [stream.speed for stream in self.streams]
            for _ in range(self._random.choice((0, 0, 1, 2, 4, 8, 30))):
                self._run_first(*self._random.choices(self.streams, speeds))

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            while not done():
                ready = [stream for stream in self.streams if stream.queue and _can_run(stream.queue[0])]
                assert ready, "the streams wait for each other"
                self._run_first(self._random.choice(ready))

    def synchronize(self, *_: Any) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))

    def _run_first(self, stream: FakeStream) -> None:
        """Run the first work of a stream, if there is any and it waits for no event."""
        if stream.queue and _can_run(stream.queue[0]):
            first = stream.queue.pop(0)
            if not isinstance(first, FakeEvent):
                first()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Launch a copy of the same type and shape on the current stream."""
        assert target.shape == source.shape and target.dtype == source.dtype
        assert target.is_contiguous() and source.is_contiguous()
        addresses, size = (target.data_ptr(), source.data_ptr()), target.numel() * target.element_size()
        self.current.launch(lambda: ctypes.memmove(*addresses, size))


def _can_run(first: FakeEvent | Work) -> bool:
    return not isinstance(first, FakeEvent) or first.happened


@contextlib.contextmanager
def fake_streams(seed: int) -> Iterator[FakeDevice]:
    """Within this context `torch.cuda` uses the streams of a fake device, on any thread."""
    device = FakeDevice(seed)

    def clone(source: Tensor, **_: Any) -> Tensor:
        result = torch.empty_like(source)
        device.copy(result, source)
        return result

    def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        device.copy(target, source)
        if not non_blocking:
            device.current.synchronize()
        return target

    empty = torch.empty
    streams = {
        "Stream": lambda *args, **kwargs: FakeStream(device, *args, **kwargs),
        "Event": lambda *args, **kwargs: FakeEvent(device, *args, **kwargs),
        "current_stream": lambda *_: device.current,
        "stream": device.on,
        "synchronize": device.synchronize,
        "set_device": lambda _: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **streams),
        mock.patch.multiple(Tensor, clone=clone, copy_=copy_),
        mock.patch.object(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)),
    ):
        yield device
        device.synchronize()
