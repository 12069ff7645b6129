"""Labels of topics by a Llama that was trained to write them.

`labels` makes the rows of its SFT from the labels of a judge. The model is asked for the coarse label,
and then for the fine one among the parts of that topic. Its answer is the label with the highest
log-probability, so it is always a label of the taxonomy.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from megatron_post.config.section import Line, Name, Section
from megatron_post.curation.judge import dialog_text, rendered
from megatron_post.curation.step import Batch
from megatron_post.curation.taxonomy import Taxonomy
from megatron_post.curation.tools import Ranker
from megatron_post.storage.checksums import sha256_of_file

LABEL_PROMPT = "label"
Labels = tuple[str, str]  # coarse and fine


class Classifier(Section):
    """A Llama that was trained to write labels."""

    model: Name = Field(description="Hugging Face directory of the model")
    overrides: tuple[Line, ...] = Field(
        (), description="overrides of its config, such as data.pack_length=2048, as in `evaluate choices`"
    )

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the files of the model. Raises `ValueError` if there are none."""
        directory = Path(self.model)
        names = ("*.safetensors", "*.json", "tokenizer.model")
        files = sorted(file for name in names for file in directory.glob(name))
        if not files:
            raise ValueError(f"classifier.model={self.model}: this is no directory with a model's files")
        return {file.name: sha256_of_file(file) for file in files}


def classify(
    batch: Batch, settings: Classifier, taxonomy: Taxonomy, *, longest: int | None
) -> list[tuple[Labels | None, str | None]]:
    """(the labels, the reason if there are none) for each row of a batch."""
    ranker = batch.tools.ranker(settings.model, settings.overrides)
    dialogs = [dialog_text(row, longest=longest) for row in batch.rows]
    coarse = _best(ranker, [(dialog, list(taxonomy.topics)) for dialog in dialogs])
    fine = _best(
        ranker,
        [
            (dialog, [] if label is None else list(taxonomy.topics[label].parts))
            for dialog, label in zip(dialogs, coarse, strict=True)
        ],
    )
    too_long = "the dialog is too long for the classifier; give the step `longest`"
    return [
        (None, too_long) if first is None or second is None else ((first, second), None)
        for first, second in zip(coarse, fine, strict=True)
    ]


def _best(ranker: Ranker, asked: Sequence[tuple[str, Sequence[str]]]) -> list[str | None]:
    """The best label for each dialog, or None if it does not fit. A single label is not ranked."""
    found: list[str | None] = [labels[0] if len(labels) == 1 else None for _, labels in asked]
    questions = {
        place: (label_prompt(dialog, labels), labels)
        for place, (dialog, labels) in enumerate(asked)
        if len(labels) > 1
    }
    fitting = {place: question for place, question in questions.items() if ranker.fits(question)}
    places = list(fitting)
    for start in range(0, len(places), ranker.at_once):
        own = places[start : start + ranker.at_once]
        for place, logps in zip(own, ranker.rank([fitting[each] for each in own]), strict=True):
            labels = fitting[place][1]
            # Of equal values the first label is the answer.
            found[place] = labels[logps.index(max(logps))]
    return found


def label_prompt(dialog: str, labels: Sequence[str]) -> str:
    """The request for one of some labels."""
    return rendered(LABEL_PROMPT, dialog=dialog, labels=labels)
