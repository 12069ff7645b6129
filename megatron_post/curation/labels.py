"""`megatron-post curate labels` writes the rows on which a classifier of topics is trained by SFT."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_post.config.data import Source
from megatron_post.curation.classifier import label_prompt
from megatron_post.curation.judge import dialog_text
from megatron_post.curation.row import ANNOTATIONS, Row
from megatron_post.curation.selection import KEPT, LEFT
from megatron_post.curation.settings import Curation
from megatron_post.curation.taxonomy import Taxonomy, load_taxonomy
from megatron_post.curation.topics import COARSE, FINE, Topics
from megatron_post.data.document import Document
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.step_example import StepExample
from megatron_post.storage.files import read_lines, write_lines
from megatron_post.storage.reading import reading


def write_labels(settings: Curation, output: str | Path) -> int:
    """Write rows of prompt and completion for each row that a step `topics` has labelled.

    One asks for the coarse label, and one for the fine label. There is none if there is only one label to
    choose from. The run must be finished. Returns the number of rows. Raises `ValueError` if there is not
    exactly one such step, or no label.
    """
    steps = [step for step in settings.steps if isinstance(step, Topics)]
    if len(steps) != 1:
        raise ValueError(f"steps: there are {len(steps)} of the kind `topics`, and labels need exactly one")
    (step,) = steps
    taxonomy, count = load_taxonomy(step.taxonomy), 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for path in (Path(settings.run) / KEPT, Path(settings.run) / LEFT):
            for number, values in enumerate(read_lines(path), start=1):
                with reading(f"{path}:{number}", "a row of a curation"):
                    rows = _rows_of(values, step, taxonomy)
                count += len(rows)
                yield from rows
        if not count:
            raise ValueError(f"{settings.run}: no row has a label of {step.column}; let a judge label rows")

    write_lines(Path(output), counted())
    return count


def _rows_of(values: dict[str, Any], step: Topics, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """The rows for one line of a run. Empty if it has no label of this taxonomy."""
    notes = values[ANNOTATIONS]
    labels = notes["steps"].get(step.column, {})
    pair = taxonomy.find(f"{labels.get(COARSE)} / {labels.get(FINE)}")
    if pair is None:
        return []
    example = example_of_row(values, Source(name="labels", path=KEPT), reasoning="render")
    assert not isinstance(example, StepExample | Document)
    row = Row(bytes.fromhex(notes["id"]), notes["source"], 0, notes["place"], values, example)
    dialog = dialog_text(row, longest=step.longest)
    choices = (list(taxonomy.topics), list(taxonomy.topics[pair[0]].parts))
    return [
        {"prompt": label_prompt(dialog, labels_of), "completion": label}
        for label, labels_of in zip(pair, choices, strict=True)
        if len(labels_of) > 1
    ]
