"""Ranks the answers that a prompt may have by their log-probabilities, with a model on these ranks.

As in T0, the log-probability is the sum over an answer's tokens, without normalisation by length. The end of
the message is one of them, as the end of the text is in T0, so that a choice can be the beginning of another
one. `evaluate choices` and the topics of `curate` use it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megatron_post.config.layout import segment_multiple
from megatron_post.config.schema import Config
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.data.batch import PackedBatch
from megatron_post.data.dialog import Dialog, Message
from megatron_post.data.template import Rendered, render
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of
from megatron_post.data.units import round_up
from megatron_post.parallel.topology import Topology
from megatron_post.rounds.segments import refuse_interleaved, rows_at_once, values_of_segments
from megatron_post.rounds.trained_model import config_of_model, running_model
from megatron_post.train.step import Stepper

Question = tuple[str, Sequence[str]]  # a prompt and its choices


@dataclass(frozen=True)
class Ranker:
    """A language model that ranks choices."""

    config: Config
    tokenizer: Tokenizer
    topology: Topology
    stepper: Stepper

    @property
    def at_once(self) -> int:
        """The number of questions that keeps all ranks busy."""
        return rows_at_once(self.config, self.topology)

    def fits(self, question: Question) -> bool:
        """Whether a prompt with each of its choices fits in `data.pack_length`."""
        longest = max(len(self._rendered(question[0], choice)) for choice in question[1])
        return round_up(longest, segment_multiple(self.config)) <= self.config.data.pack_length

    def rank(self, questions: Sequence[Question], *, rows: str = "the questions") -> list[list[float]]:
        """The log-probability of each choice of each question. All ranks must call it.

        rows: names the questions in a message. Raises `ValueError` for one that does not fit.
        """
        values = values_of_segments(
            [self._rendered(prompt, choice) for prompt, choices in questions for choice in choices],
            _sums,
            copies=self.topology.groups.tp.size(),  # context-parallel ranks have a part of each sum
            rows=rows,
            stepper=self.stepper,
            topology=self.topology,
            config=self.config,
            pad_id=self.tokenizer.pad_id,
        )
        remaining = iter(values.tolist())
        return [list(islice(remaining, len(choices))) for _, choices in questions]

    def _rendered(self, prompt: str, choice: str) -> Rendered:
        messages = (Message("user", prompt.strip()), Message("assistant", choice.strip()))
        return render(Dialog(messages), self.tokenizer)


@contextlib.contextmanager
def open_ranker(model: str | Path, overrides: Sequence[str] = ()) -> Iterator[Ranker]:
    """Load a language model on these ranks. overrides: of the config, such as `data.pack_length=2048`.

    Raises `ValueError` for a reward model and an interleaved schedule.
    """
    values = {"stage": "sft", "data": {"store": "unused", "pack_length": 8192}}
    config = config_of_model(model, values, overrides)
    refuse_interleaved(config)
    if open_weights_directory(Path(model)).scalar_head:
        raise ValueError(f"{model} is a reward model, which gives no probabilities; name a language model")
    tokenizer = tokenizer_of(config)
    with running_model(config) as (stepper, _, topology):
        yield Ranker(config, tokenizer, topology, stepper)


def _sums(logps: Tensor, batch: PackedBatch) -> Tensor:
    """The sum of the trained labels' log-probabilities of each segment on this rank, float64 [n].

    logps: fp32 [t / cp], of each token's label.
    """
    trained = torch.where(batch.trained, logps, torch.zeros_like(logps)).double()
    return trained.new_zeros(len(batch.lengths)).index_add(0, batch.segments, trained)
