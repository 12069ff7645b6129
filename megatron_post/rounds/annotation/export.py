"""Writes pairs of responses for people to compare, as JSON lines and as self-contained pages."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_post.config.data import Rating
from megatron_post.data.row_refusals import MARKERS
from megatron_post.inference.samples import read_samples
from megatron_post.pages.page import render
from megatron_post.rounds.annotation.pairs import Pair, draw_pairs
from megatron_post.rounds.annotation.settings import Annotation
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.files import line_of, write_lines, write_whole

PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class Exported:
    """What was written. between: the number of pairs whose responses are from two checkpoints."""

    pairs: int
    between: int
    pages: tuple[Path, ...]

    def __str__(self) -> str:
        return (
            f"{self.pairs} pair(s), {self.between} of them between two checkpoints, on {len(self.pages)} "
            f"page(s): {', '.join(map(str, self.pages))}"
        )


def export_pairs(
    samples: Sequence[Path], directory: Path, key: Path, settings: Annotation, *, seed: int
) -> Exported:
    """Write `pairs.jsonl` and the pages into `directory`, and the origins of the responses to `key`.

    samples: files that `generate` has written. Nothing in the directory shows which model wrote a response.
    The same call writes the same bytes. Raises `ValueError` for other files, if the key would lie in the
    directory, if the directory has other pairs, and if there are no pairs.
    """
    if lies_in(key, directory):
        raise ValueError(
            f"the key {key} would be in {directory}, which is given to the people who compare; choose a path "
            "outside it"
        )
    rows = [row for path in samples for row in read_samples(path)]
    drawn = draw_pairs(rows, seed=seed, most=settings.pairs)
    pairs = [found.pair for found in drawn]
    _check_free(directory / PAIRS, [pair.as_json() for pair in pairs])
    _check_free(key, [found.key for found in drawn])
    count = min(settings.pages, len(pairs))
    pages = tuple(directory / f"annotate-{number}.html" for number in range(1, count + 1))
    write_lines(key, (found.key for found in drawn))
    for number, page in enumerate(pages):
        # Every count-th pair, so that the pages have as many pairs as possible in common size.
        write_whole(page, _page(pairs[number::count], number=number + 1, of=count))
    for path in set(directory.glob("annotate-*.html")) - set(pages):
        path.unlink()  # a page of an earlier export, which had more pages
    # The pairs come last. An export that was killed has none, so that nobody can import answers to it.
    write_lines(directory / PAIRS, (pair.as_json() for pair in pairs))
    return Exported(len(pairs), sum(found.is_between_checkpoints for found in drawn), pages)


def lies_in(path: Path, place: Path) -> bool:
    """Whether a path is the same file as `place`, or below it if that is a directory."""
    # `Path.resolve` raises for a loop of links. A loop is an error of reading, which names the file.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place))


def _check_free(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Raise `ValueError` if there is a file with anything else than these rows.

    People may be comparing other pairs. Their answers could not be imported without the pairs and the key.
    """
    if path.exists() and not (path.is_file() and path.read_text() == "".join(map(line_of, rows))):
        raise ValueError(f"{path} exists and is not of these pairs; choose another path, or remove it")


def _page(pairs: Sequence[Pair], *, number: int, of: int) -> str:
    """A page on which a person compares pairs. It has all that it needs, and cannot use a network."""
    shown = [pair.as_json() for pair in pairs]
    return render(
        Path(__file__).parent / "page.html.j2",
        title=f"Compare responses, page {number} of {of}" if of > 1 else "Compare responses",
        # The browser saves answers under this name, so that two exports do not share them.
        name=sha256_of_json([pair["pair"] for pair in shown])[:12],
        pairs=shown,
        markers=MARKERS,
        ratings=[(rating, rating.replace("_", " ")) for rating in get_args(Rating)],
    )
