"""Turns examples into units of rendered segments, the input of packing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, get_args

import numpy as np

from megatron_post.config.data import Preferences, Rating, Source
from megatron_post.config.stages import StageName
from megatron_post.data.dialog import Dialog, Preference
from megatron_post.data.document import Document
from megatron_post.data.permutation import permutation
from megatron_post.data.step_example import Example, StepExample
from megatron_post.data.template import (
    Rendered,
    render_batch,
    render_documents,
    render_preferences,
    render_solutions,
)
from megatron_post.data.tokenizer import Tokenizer

Unit = tuple[Rendered, ...]  # the segments of one example, which must stay in one pack


class ExampleUnits(Protocol):
    """Makes units of one source's rows, and counts the rows that `data.preferences` leaves out."""

    filtered: int

    def __call__(self, rows: Sequence[tuple[int, Example]]) -> list[list[Unit]]:
        """The units of each (row number, example). There are none if a rule leaves the row out."""


class DialogUnits:
    """Makes one segment of each dialog, for SFT. Raises `ValueError` for a preference."""

    filtered = 0

    def __init__(self, source: str, tokenizer: Tokenizer, *, stage: StageName) -> None:
        self._source, self._tokenizer, self._stage = source, tokenizer, stage

    def __call__(self, rows: Sequence[tuple[int, Example]]) -> list[list[Unit]]:
        dialogs = []
        for _, example in rows:
            if isinstance(example, Document):
                raise ValueError(
                    f"source {self._source!r} holds documents, stage={self._stage} trains dialogs; "
                    "stage=pretrain trains on such rows"
                )
            if isinstance(example, StepExample):
                raise ValueError(
                    f"source {self._source!r} holds labelled steps, stage={self._stage} trains dialogs; "
                    "stage=step_reward trains on such rows"
                )
            if not isinstance(example, Dialog):
                raise ValueError(
                    f"source {self._source!r} holds preferences, stage={self._stage} trains dialogs; give "
                    "the chosen responses as dialogs, as with columns={user: prompt, assistant: chosen}"
                )
            dialogs.append(example)
        return [[(rendered,)] for rendered in render_batch(dialogs, self._tokenizer)]


class DocumentUnits:
    """Makes one segment of each document."""

    filtered = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[tuple[int, Example]]) -> list[list[Unit]]:
        texts = []
        for _, example in rows:
            assert isinstance(example, Document)  # `documents_of` has given the source this form
            texts.append(example.text)
        return [[(rendered,)] for rendered in render_documents(texts, self._tokenizer)]


def documents_of(source: Source) -> Source:
    """The source with its column of documents, which is `text` by default. Raises `ValueError`."""
    if source.format not in ("auto", "columns") or (source.columns and "text" not in source.columns):
        raise ValueError(
            f"source {source.name!r}: stage=pretrain trains plain texts; leave out format={source.format} "
            "and other columns, and name theirs as columns={text: content} if it is not `text`"
        )
    return source.model_copy(update={"columns": source.columns or {"text": "text"}})


class SolutionUnits:
    """Makes one segment of each solution with labelled steps. Raises `ValueError` for other examples.

    separator: as `data.steps.separator`.
    """

    filtered = 0

    def __init__(self, source: str, tokenizer: Tokenizer, *, separator: str) -> None:
        self._source, self._tokenizer, self._separator = source, tokenizer, separator

    def __call__(self, rows: Sequence[tuple[int, Example]]) -> list[list[Unit]]:
        solutions, counts = [], []
        for _, example in rows:
            if not isinstance(example, StepExample):
                raise ValueError(
                    f"source {self._source!r} holds rows without labelled steps; stage=step_reward needs "
                    "rows with prompt, completions and labels (map columns if they have other names, as "
                    "{user: prompt, steps: completions, labels: labels}), or PRM800K's rows"
                )
            solutions += [(example.prompt, solution, example.tools) for solution in example.solutions]
            counts.append(len(example.solutions))
        rendered = iter(render_solutions(solutions, self._tokenizer, separator=self._separator))
        return [[(next(rendered),) for _ in range(count)] for count in counts]


class PreferenceUnits:
    """Makes units of preferences for the reward model and DPO, by the rules of the Llama 3 report.

    With the layout "separate" every response is a segment that repeats the prompt. With "isolated" and
    "concatenated" the prompt is the first segment, and each response is one more. With "isolated_pairs" each
    response's segment also begins with the prompt's last token, which the first segment leaves out. The order
    of responses is drawn from (seed, source, row), because the reward model must not learn that the first one
    is the best. pair_only keeps the best and the worst response only, which DPO compares. Raises `ValueError`
    for a dialog and for labelled steps.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        layout: str,
        rules: Preferences,
        pair_only: bool,
        seed: int,
    ) -> None:
        self._source, self._tokenizer, self._seed = source, tokenizer, seed
        self._layout, self._rules, self._pair_only = layout, rules, pair_only
        self.filtered = 0

    def __call__(self, rows: Sequence[tuple[int, Example]]) -> list[list[Unit]]:
        preferences = []
        for _, example in rows:
            if not isinstance(example, Preference):
                raise ValueError(
                    f"source {self._source!r} holds rows without ranked responses; this stage needs rows "
                    "with chosen and rejected (map columns if they have other names)"
                )
            preferences.append(example)
        rendered = render_preferences(preferences, self._tokenizer)
        units = [
            self._unit(row, preference, prompt, responses)
            for (row, _), preference, (prompt, responses) in zip(rows, preferences, rendered, strict=True)
        ]
        self.filtered += units.count(None)
        return [[] if unit is None else [unit] for unit in units]

    def _unit(
        self, row: int, preference: Preference, prompt: Rendered, responses: tuple[Rendered, ...]
    ) -> Unit | None:
        if not _rated_high_enough(preference.rating, self._rules.min_rating):
            return None
        if self._pair_only:
            responses = (responses[0], responses[-1])
        tokens = [response.tokens for response in responses]
        pairs = [(a, b) for i, a in enumerate(tokens) for b in tokens[i + 1 :]]
        if max(similarity(a, b) for a, b in pairs) > self._rules.max_similarity:
            return None
        order = permutation(len(responses), self._seed, "responses", self._source, row).tolist()
        ranked = tuple(replace(responses[rank], rank=rank) for rank in order)
        if self._layout == "separate":
            return tuple(_joined(prompt, response) for response in ranked)
        if self._layout == "isolated_pairs":
            shared, last = prompt[:-1], prompt[-1:]
            return (shared, *(_joined(last, response) for response in ranked))
        return (prompt, *ranked)


def _rated_high_enough(rating: str | None, least: str | None) -> bool:
    """Whether a rating is at least `least`. A row without a rating is kept."""
    ratings = get_args(Rating)  # best first
    return rating is None or least is None or ratings.index(rating) <= ratings.index(least)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The share of token trigrams that two responses have in common (Jaccard index), from 0 to 1.

    a, b: int [n], [m], token ids. [1 2 3 4] and [1 2 3 5] have the trigrams {123, 234} and {123, 235}. One of
    three is common, which gives 1/3. Texts that are shorter than a trigram are compared whole.
    """
    of_a, of_b = _trigrams(a), _trigrams(b)
    return len(of_a & of_b) / len(of_a | of_b)


def _trigrams(tokens: np.ndarray) -> set[bytes]:
    width = min(3, len(tokens))
    return {tokens[i : i + width].tobytes() for i in range(len(tokens) - width + 1)}


def _joined(prompt: Rendered, response: Rendered) -> Rendered:
    return Rendered(
        np.concatenate((prompt.tokens, response.tokens)),
        np.concatenate((prompt.roles, response.roles)),
        response.rank,
    )
