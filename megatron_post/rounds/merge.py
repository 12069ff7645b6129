"""`megatron-post merge`: several models of one architecture averaged to one, tensor by tensor, in blocks.

A merge is a source like any other: asked for rows of a tensor, it reads the same rows of its models. So the
converter writes it, with the memory of a few blocks, and it is there complete or not at all.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.convert.configs import fingerprint_of, with_dtype
from megatron_post.convert.hf_config import differences
from megatron_post.convert.jobs import Report, convert
from megatron_post.convert.open_model import open_model
from megatron_post.convert.shards import SHARD_BYTES
from megatron_post.convert.source import DTYPE_NAMES, Kind, ModelSource, read_rows, row_blocks
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.rounds.merge_methods import (
    MagnitudeThreshold,
    dare_mask,
    disjoint_mean,
    elected_sum,
    kept_count,
    slerp_coefficients,
    trim,
    weighted_mean,
)
from megatron_post.rounds.merge_settings import MethodMerge

_CACHED_BYTES = 2**20  # of one source: some ten tensors of that size are in use at a time
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def merge(plan: MethodMerge, directory: str | Path, *, workers: int = 1, report: Report) -> bool:
    """Write the merged model to a Hugging Face directory; the same call again goes on with a killed one.

    Returns whether it is complete (False: other nodes still write). Raises `ValueError` for models of
    different architectures or tokenizers, patterns that fit no tensor, weights that sum to 0, and what
    `convert` raises.
    """
    return convert(MergeJob(plan.model_dump_json(), str(directory)), workers=workers, report=report)


@dataclass(frozen=True)
class MergeJob(ToHuggingFace):
    """The converter's job on a merge. source: a `MethodMerge` as JSON, which travels to other processes."""

    max_shard_bytes: int = SHARD_BYTES

    @cached_property
    def _source(self) -> "MergedModel":
        return MergedModel(MethodMerge.model_validate_json(self.source))

    @property
    def _read_from(self) -> Sequence[ModelSource]:
        return self._source.sources


class MergedModel:
    """A `ModelSource` whose tensors are computed from those of other models, in float32.

    linear   the weighted mean
    slerp    on the arc from the first to the second, the second's share of the weights far; each tensor is
             one vector. Straight from one to the other where they are nearly parallel.
    ties     base + scale x the disjoint mean of the deltas, each trimmed to its `density` largest values
             (equal ones at the threshold all stay)
    dare_ties  base + scale x the sum of the agreeing deltas over the sum of all weights, each delta's values
             dropped at random but for `density` of them, which are divided by it (L. Yu et al., "Language
             Models are Super Mario", 2024). Dividing by the weights of those that agree, as TIES does, would
             count what was dropped twice: two equal models of density 0.5 would yield 1.5 times their delta.
    """

    def __init__(self, plan: MethodMerge) -> None:
        self._plan = plan
        self._models = [open_model(Path(m.model)) for m in plan.models]
        self._base = None if plan.base_model is None else open_model(Path(plan.base_model))
        paths = [m.model for m in plan.models] + ([] if plan.base_model is None else [plan.base_model])
        sources = [*self._models, *([] if self._base is None else [self._base])]
        _check_alike(paths, sources)
        first = sources[0]
        self.model: Model = first.model
        self.scalar_head: bool = first.scalar_head
        self.tensors = {
            name: Kind(DTYPE_NAMES[plan.dtype] if plan.dtype else kind.dtype, kind.shape)
            for name, kind in first.tensors.items()
        }
        self._check_settings()
        self.sources: Sequence[ModelSource] = sources
        self._prepared: tuple[str, list[float] | tuple[float, float] | None] = ("", None)

    @property
    def fingerprint(self) -> str:
        """Of all models and of everything that the plan says."""
        return fingerprint_of(
            {str(i): source.fingerprint.encode() for i, source in enumerate(self.sources)}
            | {"plan": self._plan.model_dump_json().encode()}
        )

    def companions(self) -> dict[str, bytes]:
        companions = self._models[0].companions()
        dtypes = {kind.dtype for kind in self.tensors.values()}
        return with_dtype(companions, dtypes.pop()) if len(dtypes) == 1 else companions

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        for first, values in self._pieces(name, row, row + len(out)):
            out[first - row :][: len(values[0])].copy_(self._merged(name, first, values))

    def _merged(self, name: str, row: int, values: list[Tensor]) -> Tensor:
        """values: rows from `row` on of all sources, which are used up."""
        settings = [m.setting(name) for m in self._plan.models]
        weights = [weight for weight, _ in settings]
        match self._plan.method:
            case "linear":
                return weighted_mean(values, weights)
            case "slerp":
                return self._slerp(name, values, weights)
            case "ties":
                base, deltas = _deltas(values)
                thresholds = self._of_tensor(name)
                assert isinstance(thresholds, list)
                trimmed = [trim(delta, least) for delta, least in zip(deltas, thresholds, strict=True)]
                return base.add_(disjoint_mean(trimmed, weights), alpha=self._plan.scale)
            case "dare_ties":
                base, deltas = _deltas(values)
                for number, (delta, (_, density)) in enumerate(zip(deltas, settings, strict=True)):
                    key = f"{self._plan.seed}/{number}/{name}"
                    kept = dare_mask(key, row * delta[0].numel(), delta.numel(), density=density)
                    delta.mul_(kept.view_as(delta)).div_(density)
                total, _ = elected_sum(deltas, weights)
                return base.add_(total, alpha=self._plan.scale / math.fsum(weights))

    def _slerp(self, name: str, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        share, (first, second) = weights[1] / math.fsum(weights), values
        coefficients = self._of_tensor(name)
        if coefficients is None:
            return first + share * (second - first)  # in this form, equal models stay what they are
        return coefficients[0] * first + coefficients[1] * second

    def _of_tensor(self, name: str) -> list[float] | tuple[float, float] | None:
        """What depends on a whole tensor: trimming thresholds, or slerp's coefficients; kept until the next
        one."""
        if self._prepared[0] != name:
            prepare = self._coefficients if self._plan.method == "slerp" else self._thresholds
            self._prepared = (name, prepare(name))
        return self._prepared[1]

    def _thresholds(self, name: str) -> list[float]:
        size = math.prod(self.tensors[name].shape)
        densities = [m.setting(name)[1] for m in self._plan.models]
        searches = [MagnitudeThreshold(kept_count(density, size)) for density in densities]
        trimmed = [density < 1 for density in densities]
        for count in (MagnitudeThreshold.count_upper, MagnitudeThreshold.count_lower):
            for _, values in self._pieces(name, 0, self.tensors[name].shape[0]) if any(trimmed) else ():
                _, deltas = _deltas(values)
                for search, delta, trims in zip(searches, deltas, trimmed, strict=True):
                    if trims:
                        count(search, delta)
        return [s.value() if trims else 0.0 for s, trims in zip(searches, trimmed, strict=True)]

    def _coefficients(self, name: str) -> tuple[float, float] | None:
        dot, squares = 0.0, [0.0, 0.0]
        for _, (first, second) in self._pieces(name, 0, self.tensors[name].shape[0]):
            a, b = first.double().reshape(-1), second.double().reshape(-1)
            dot += float(a @ b)
            squares[0] += float(a @ a)
            squares[1] += float(b @ b)
        weights = [m.setting(name)[0] for m in self._plan.models]
        return slerp_coefficients(dot, (squares[0], squares[1]), weights[1] / math.fsum(weights))

    def _pieces(self, name: str, start: int, end: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Rows [start, end) of all sources in float32, memory of their own, and the first row's number: read
        in blocks, cut to pieces that a core's cache holds. Sums over a whole tensor's are reproducible."""
        row = self.tensors[name].shape[1:]
        for low, high in row_blocks(Kind(torch.float32, (end - start, *row))):
            blocks = [read_rows(source, name, start + low, start + high) for source in self.sources]
            inside = Kind(torch.float32, (high - low, *row))
            for first, last in row_blocks(inside, block_bytes=_CACHED_BYTES):
                yield start + low + first, [block[first:last].float() for block in blocks]

    def _check_settings(self) -> None:
        for ingredient in self._plan.models:
            deciding = [ingredient.layer_of(name) for name in self.tensors]
            for layer in ingredient.layers:
                if not any(fnmatchcase(name, layer.tensors) for name in self.tensors):
                    raise ValueError(
                        f"{ingredient.model}: no tensor fits the pattern {layer.tensors!r}; names are like "
                        f"{list(self.tensors)[1]} (`megatron-post convert inspect` lists them)"
                    )
                if not any(found is layer for found in deciding):
                    raise ValueError(
                        f"{ingredient.model}: every tensor that fits the pattern {layer.tensors!r} fits one "
                        "before it, and the first decides; put the narrower pattern first"
                    )
        for name in self.tensors:
            if not math.fsum(m.setting(name)[0] for m in self._plan.models):
                raise ValueError(f"the models' weights for {name} sum to 0; give one of them a weight")


def _deltas(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The last of all sources is the base."""
    *models, base = values
    return base, [model.sub_(base) for model in models]


def _check_alike(paths: Sequence[str], sources: Sequence[ModelSource]) -> None:
    """Raises `ValueError` unless all have one architecture, one head and one tokenizer."""
    first, companions = sources[0], sources[0].companions()
    for path, source in zip(paths[1:], sources[1:], strict=True):
        found = [
            line.replace("in the config", f"in {paths[0]}").replace("in the weights", f"in {path}")
            for line in differences(first.model, source.model)
        ]
        if source.scalar_head != first.scalar_head:
            found.append("one is a reward model, the other a language model")
        if not _same_tokenizer(companions, source.companions()):
            found.append("their tokenizers differ: the same text would have other ids")
        if found:
            raise ValueError(f"{paths[0]} and {path} cannot be merged:\n  " + "\n  ".join(found))


def _same_tokenizer(a: dict[str, bytes], b: dict[str, bytes]) -> bool:
    """Whether two directories' files give the same ids; two that have none pass."""
    first, second = ({n: files[n] for n in _TOKENIZERS if n in files} for files in (a, b))
    if first == second:
        return True
    return bool(first) and bool(second) and _tokenizer_fingerprint(first) == _tokenizer_fingerprint(second)


def _tokenizer_fingerprint(files: dict[str, bytes]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            Path(directory, name).write_bytes(content)
        try:
            return load_tokenizer(directory).fingerprint
        except ValueError:
            return json.dumps(sorted((name, content.hex()) for name, content in files.items()))
