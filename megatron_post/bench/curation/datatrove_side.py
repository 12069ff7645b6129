"""Runs datatrove's MinHash over the rows of a workload, in its three stages."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from megatron_post.bench.curation.own_side import PartFigures, in_processes, slowest
from megatron_post.bench.curation.workload import Workload
from megatron_post.bench.memory import peak_rss

_NGRAM = 3  # words, as in `near_duplicates`. The other settings are datatrove's defaults


def measure_datatrove(
    workload: Workload, directory: Path, *, processes: int
) -> tuple[list[PartFigures], int]:
    """The stages in their order, and the number of rows that would be removed.

    The first two stages run in `processes` processes, and the last one in one, as datatrove wants it.
    """
    stages: list[tuple[str, Callable[[Path, Path, int, int], None], int]] = [
        ("datatrove: signatures", _sign, processes),
        ("datatrove: buckets", _match, min(processes, _config().num_buckets)),
        ("datatrove: clusters", _cluster, 1),
    ]
    figures = []
    for name, stage, size in stages:
        ranks = [(name, stage, workload.rows, directory, rank, size) for rank in range(size)]
        figures.append(slowest(name, in_processes(_timed, ranks)))
    removed = sum(path.stat().st_size for path in (directory / "removed").glob("*.remove"))
    return figures, removed // struct.calcsize("<I")


def _timed(
    name: str,
    stage: Callable[[Path, Path, int, int], None],
    rows: Path,
    directory: Path,
    rank: int,
    size: int,
) -> PartFigures:
    """Run one process of a stage. Importing the library does not count."""
    from datatrove.utils.logging import logger

    logger.remove()
    _config()
    start = time.perf_counter()
    stage(rows, directory, rank, size)
    return PartFigures(name, time.perf_counter() - start, peak_rss() / 2**20)


def _config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    return MinhashConfig(n_grams=_NGRAM)


def _sign(rows: Path, directory: Path, rank: int, size: int) -> None:
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """Words between blanks. datatrove's own class for English needs spaCy, which takes longer."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    def documents() -> Iterator[Document]:
        with rows.open() as file:
            for number, line in islice(enumerate(file), rank, None, size):
                text = " ".join(message["content"] for message in json.loads(line)["messages"])
                yield Document(text=text, id=str(number))

    stage = MinhashDedupSignature(str(directory / "signatures"), _config(), language=Words())
    # datatrove gives text to xxhash, which since its version 4 only takes bytes
    stage._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
    stage.run(documents(), rank, size)


def _match(rows: Path, directory: Path, rank: int, size: int) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

    config = _config()
    stage = MinhashDedupBuckets(str(directory / "signatures"), str(directory / "buckets"), config=config)
    for bucket in range(rank, config.num_buckets, size):
        stage.run(None, bucket, config.num_buckets)


def _cluster(rows: Path, directory: Path, rank: int, size: int) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

    MinhashDedupCluster(str(directory / "buckets"), str(directory / "removed"), _config()).run()
