"""Renders the batches of a group in several processes. The results come in the order of the batches."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import chain, islice
from types import TracebackType
from typing import Self

from megatron_post.config.schema import Config
from megatron_post.data.rendering import BatchCounts, RenderedBatch, Renderer
from megatron_post.data.sources import PackedSource
from megatron_post.data.spill import Spill
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of

# A process takes seconds to start. This process renders fewer batches than that by itself.
_BATCHES_FOR_PROCESSES = 12


class RenderPool:
    """A context manager that renders batches of a group into its spill, in processes if there are many."""

    def __init__(
        self,
        config: Config,
        sources: Sequence[PackedSource],
        tokenizer: Tokenizer,
        spill: Spill,
        *,
        workers: int,
    ) -> None:
        row_sources = [(packed.source, packed.template_digest) for packed in sources]
        self._renderer = Renderer(config, row_sources, tokenizer)
        self._settings = pickle.dumps((config, row_sources))
        self._spill, self._workers = spill, workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. Later batches would start new ones."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def render(self, batches: Iterator[bytes]) -> Iterator[BatchCounts]:
        """Put the units of each batch into the spill, and yield its counts. See `rendering.batch_of`.

        A batch with an error yields its counts, and then the `ValueError` is raised. Raises `ValueError` if a
        process is killed.
        """
        ahead: deque[BatchCounts | Future[RenderedBatch]] = deque()
        for batch in self._unfinished(batches):
            ahead.append(batch)
            while len(ahead) > 2 * self._workers:
                yield from self._stored(ahead.popleft())
        while ahead:
            yield from self._stored(ahead.popleft())

    def _unfinished(self, batches: Iterator[bytes]) -> Iterator[BatchCounts | Future[RenderedBatch]]:
        """The counts of batches that the spill holds, then the results of all others."""
        for batch in batches:
            found = self._spill.take(self._renderer.digest(batch)) if self._spill.may_hold else None
            if found is None:
                yield from self._submitted(chain([batch], batches))
                return
            yield BatchCounts(**found)

    def _submitted(self, batches: Iterator[bytes]) -> Iterator[Future[RenderedBatch]]:
        if self._executor is None:
            first = list(islice(batches, _BATCHES_FOR_PROCESSES))
            if len(first) < _BATCHES_FOR_PROCESSES:
                for batch in first:
                    done: Future[RenderedBatch] = Future()
                    done.set_result(self._renderer(batch))
                    yield done
                return
            batches = chain(first, batches)
            # The progress bar has a thread, and a fork of a process with threads can hang.
            self._executor = ProcessPoolExecutor(
                self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start
            )
        for batch in batches:
            yield self._executor.submit(_render, self._settings, batch)

    def _stored(self, batch: BatchCounts | Future[RenderedBatch]) -> Iterator[BatchCounts]:
        if isinstance(batch, BatchCounts):
            yield batch
            return
        try:
            rendered = batch.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process that renders rows was killed, perhaps because memory ran out; run the command "
                "again with fewer --workers, and it continues with the rows that are finished"
            ) from None
        if rendered.error is None:
            self._spill.append(rendered.block, rendered.counts.as_json(), rendered.digest)
        yield rendered.counts
        if rendered.error is not None:
            raise rendered.error


def _start() -> None:
    """Prepare a process of the pool."""
    # The processes share the cores already, so threads in each of them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is killed. Otherwise it would wait for batches forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render(settings: bytes, batch: bytes) -> RenderedBatch:
    return _renderer(settings)(batch)


@lru_cache(maxsize=1)
def _renderer(settings: bytes) -> Renderer:
    config, sources = pickle.loads(settings)
    return Renderer(config, sources, tokenizer_of(config))
