"""The loader's batches through NVIDIA DALI, which copies them to the GPU ahead of use (extra `dali`)."""

import dataclasses
import inspect
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from megatron_post.data.loader import PackLoader
from megatron_post.data.pack import Pack
from megatron_post.installation import install_command

# What the model needs on the device, and DALI's names of their types. The rest of a pack does not pass DALI.
# The host reads the other arrays of every pack. If they were on the device, it would wait for all work before
# the copy.
_MOVED = {"tokens": "INT32"}


class DaliLoader:
    """The same packs as `PackLoader` gives, in the same order.

    device_id None: a CPU-only pipeline and NumPy arrays, as `PackLoader`'s. A GPU's number: `tokens` is a
    torch tensor on that GPU, and `prefetch` packs are copied ahead on DALI's own stream. Raises `ValueError`
    where DALI is not installed, or is older than 1.53.
    """

    def __init__(self, loader: PackLoader, *, device_id: int | None = None, prefetch: int = 2) -> None:
        self._loader = loader
        self._device_id = device_id
        self._held: deque[tuple[Any, torch.cuda.Event]] = deque()
        self._inside: deque[Pack] = deque()  # packs that the pipeline has taken and not given back yet
        self._pipeline = _pipeline(
            _import_dali(), _feed(loader, self._inside), device_id=device_id, prefetch=prefetch
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Pack]:
        return [self._next_pack() for _ in range(self._loader.packs_a_step)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the loader behind. This one cannot be used afterwards."""
        self._loader.close()

    def _next_pack(self) -> Pack:
        outputs = self._pipeline.run()
        moved = {name: self._hand_over(output) for name, output in zip(_MOVED, outputs, strict=True)}
        if self._device_id is not None:
            self._hold(outputs)
        return dataclasses.replace(self._inside.popleft(), **moved)

    def _hold(self, outputs: Any) -> None:
        """Keep a pack's buffers until the GPU has run the copies of them.

        DALI fills a buffer again once nothing holds it, and the copies are only queued by then. They run
        after the update of the step before, so the host does not wait for them.
        """
        self._held.append((outputs, torch.cuda.current_stream(self._device_id).record_event()))
        while self._held and self._held[0][1].query():
            self._held.popleft()

    def _hand_over(self, output: Any) -> Any:
        """A copy, since DALI uses its buffers again."""
        if self._device_id is None:
            return np.array(output.at(0))
        return torch.from_dlpack(output[0]).clone()


def _import_dali() -> ModuleType:
    try:
        import nvidia.dali
    except ImportError as error:
        raise ValueError(
            f"data.backend=dali needs NVIDIA DALI: {error}; install it ({install_command('dali')}), or set "
            "data.backend=torch"
        ) from error
    if "exec_dynamic" not in inspect.signature(nvidia.dali.Pipeline).parameters:
        raise ValueError(
            f"data.backend=dali: NVIDIA DALI {nvidia.dali.__version__} reuses the memory of batches that are "
            f"still in use; install 1.53 or later ({install_command('dali')}), or set data.backend=torch"
        )
    return nvidia.dali


def _feed(loader: PackLoader, inside: deque[Pack]) -> Iterator[tuple[list[np.ndarray], ...]]:
    """What DALI's external source asks for: batches of one sample, the fields of `_MOVED` of one pack."""
    for packs in loader:
        for pack in packs:
            inside.append(pack)
            yield tuple([getattr(pack, name)] for name in _MOVED)


def _pipeline(dali: ModuleType, source: Any, *, device_id: int | None, prefetch: int) -> Any:
    pipeline = dali.Pipeline(
        batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=prefetch, exec_dynamic=True
    )
    with pipeline:
        outputs = dali.fn.external_source(
            source=source,
            num_outputs=len(_MOVED),
            batch=True,
            dtype=[getattr(dali.types, name) for name in _MOVED.values()],
            ndim=1,
            no_copy=device_id is None,  # for a GPU, DALI copies to pinned memory first
        )
        pipeline.set_outputs(*(outputs if device_id is None else [output.gpu() for output in outputs]))
    pipeline.build()
    return pipeline
