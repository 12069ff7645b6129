"""`megatron-post merge` averages several models of one architecture, tensor by tensor and in blocks of rows.

A merged model is a `ModelSource`. To give rows of a tensor, it reads the same rows of all models. So the
converter can write it with the memory of a few blocks, and an incomplete result is never visible.

The library PEFT 0.21.2 was compared. Its `merge_utils` has linear, TIES and DARE of tensors in memory. It
stacks whole tensors of all models, and has no files and no slerp. Its DARE draws from torch's global
generator, so the result depends on the order of the tensors. Here each tensor has its own draws.
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

from megatron_post.config.load import SettingsSource
from megatron_post.config.sections import Model
from megatron_post.convert.configs import fingerprint_of, with_dtype
from megatron_post.convert.hf_config import differences
from megatron_post.convert.jobs import Converted, Report, convert
from megatron_post.convert.open_model import open_model
from megatron_post.convert.publishing.card import merged_documents
from megatron_post.convert.shards import SHARD_BYTES
from megatron_post.convert.source import DTYPE_NAMES, Kind, ModelSource, read_rows, row_blocks
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.display import say
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
from megatron_post.rounds.merge_settings import Method, MethodMerge, load_merge

# The size of a piece of one source. About ten tensors of this size are in use at once and should fit in a
# cache.
_CACHED_BYTES = 2**20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def merge(
    models: MethodMerge | SettingsSource,
    directory: str | Path,
    *,
    method: Method = "linear",
    workers: int = 1,
    report: Report = say,
) -> Converted:
    """Write the merged model to a Hugging Face directory. The same call continues one that was killed.

    models: a merge file, or its keys and values. A `MethodMerge` has its own method.

    Raises `ValueError` for models of
    different architectures or tokenizers, patterns that match no tensor, and weights that sum to 0. Also
    raises the errors of `convert`.
    """
    plan = models if isinstance(models, MethodMerge) else load_merge(models, method)
    return convert(MergeJob(plan.model_dump_json(), str(directory)), workers=workers, report=report)


@dataclass(frozen=True)
class MergeJob(ToHuggingFace):
    """The converter's job for a merge. source: a `MethodMerge` as JSON, to send it to other processes."""

    max_shard_bytes: int = SHARD_BYTES

    @cached_property
    def _source(self) -> "MergedModel":
        return MergedModel(MethodMerge.model_validate_json(self.source))

    @property
    def _read_from(self) -> Sequence[ModelSource]:
        return self._source.sources


class MergedModel:
    """A `ModelSource` whose tensors are computed in float32 from those of other models.

    linear     The weighted mean.
    slerp      A point on the arc from the first model to the second. The second's share of the weights is the
               position on the arc, and each tensor is one vector. Nearly parallel tensors use a straight
               line.
    ties       base + scale x the disjoint mean of the deltas. Each delta is trimmed to the `density` share of
               its largest values, and all values that equal the threshold stay.
    dare_ties  base + scale x the sum of the agreeing deltas over the sum of all weights. In each delta a
    random
               share `density` of the values is kept and divided by the density (L. Yu et al., "Language
               Models are Super Mario", 2024). Dividing by the weights of the agreeing models, as in TIES,
               would correct for dropped values twice. Two equal models of density 0.5 would give 1.5 times
               their delta.
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
        self.scores_steps: bool = first.scores_steps
        self.tensors = {
            name: Kind(DTYPE_NAMES[plan.dtype] if plan.dtype else kind.dtype, kind.shape)
            for name, kind in first.tensors.items()
        }
        self._check_settings()
        self.sources: Sequence[ModelSource] = sources
        self._prepared: tuple[str, list[float] | tuple[float, float] | None] = ("", None)

    @property
    def fingerprint(self) -> str:
        """A digest of all models and of the whole plan."""
        return fingerprint_of(
            {str(i): source.fingerprint.encode() for i, source in enumerate(self.sources)}
            | {"plan": self._plan.model_dump_json().encode()}
        )

    def companions(self) -> dict[str, bytes]:
        companions = self._models[0].companions()
        dtypes = {kind.dtype for kind in self.tensors.values()}
        return with_dtype(companions, dtypes.pop()) if len(dtypes) == 1 else companions

    def documents(self) -> dict[str, bytes]:
        plan = self._plan
        settings = plan.model_dump(mode="json", include={"method", "scale", "dtype", "seed"})
        found = [source.documents() for source in self._models]
        return merged_documents(found, [m.weight for m in plan.models], settings, self.companions())

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        for first, values in self._pieces(name, row, row + len(out)):
            out[first - row :][: len(values[0])].copy_(self._merged(name, first, values))

    def _merged(self, name: str, row: int, values: list[Tensor]) -> Tensor:
        """The merged rows from `row` on. values: these rows of all sources, which are overwritten."""
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
            return first + share * (second - first)  # in this form equal models give exactly the same model
        return coefficients[0] * first + coefficients[1] * second

    def _of_tensor(self, name: str) -> list[float] | tuple[float, float] | None:
        """Trimming thresholds or slerp's coefficients, which depend on a whole tensor.

        They are cached for the current tensor, because its blocks are merged one after another.
        """
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
        """Yield (first row, the rows of all sources in float32, as copies) for rows [start, end).

        Rows are read in blocks, which are cut to pieces that fit in a core's cache. The cuts are always the
        same, so sums over a whole tensor are reproducible.
        """
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
                        f"{ingredient.model}: no tensor matches the pattern {layer.tensors!r}; names are "
                        f"like {list(self.tensors)[1]} (`megatron-post convert inspect` lists them)"
                    )
                # Such a pattern would have no effect, which is probably a mistake of the user.
                if not any(found is layer for found in deciding):
                    raise ValueError(
                        f"{ingredient.model}: every tensor that matches the pattern {layer.tensors!r} "
                        "matches an earlier one, and the first decides; put the narrower pattern first"
                    )
        for name in self.tensors:
            if not math.fsum(m.setting(name)[0] for m in self._plan.models):
                raise ValueError(f"the models' weights for {name} sum to 0; give one of them a weight")


def _deltas(values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The base, which is the last value, and the differences of the others from it."""
    *models, base = values
    return base, [model.sub_(base) for model in models]


def _check_alike(paths: Sequence[str], sources: Sequence[ModelSource]) -> None:
    """Raise `ValueError` unless all sources have the same architecture, head and tokenizer."""
    first, companions = sources[0], sources[0].companions()
    for path, source in zip(paths[1:], sources[1:], strict=True):
        found = [
            line.replace("in the config", f"in {paths[0]}").replace("in the weights", f"in {path}")
            for line in differences(first.model, source.model)
        ]
        if source.scalar_head != first.scalar_head:
            found.append("one is a reward model, the other a language model")
        elif source.scores_steps != first.scores_steps:
            found.append("one reward model scores steps, the other whole responses")
        if not _same_tokenizer(companions, source.companions()):
            found.append("their tokenizers differ, so the same text would have different ids")
        if found:
            raise ValueError(f"{paths[0]} and {path} cannot be merged:\n  " + "\n  ".join(found))


def _same_tokenizer(a: dict[str, bytes], b: dict[str, bytes]) -> bool:
    """Whether the tokenizers of two directories give the same ids. Two directories without one are equal."""
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
