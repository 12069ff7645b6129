"""Computes how often each row of each source is used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_post.config.data import Source
from megatron_post.data.permutation import permutation


@dataclass(frozen=True)
class Share:
    """One source's part of the mixture. `rows` and `tokens` count repeats, and shares are of the total."""

    name: str
    available: int
    rows: int
    tokens: int
    row_share: float
    token_share: float

    @property
    def epochs(self) -> float:
        """How often a row is used on average."""
        return self.rows / self.available if self.available else 0.0


def mix(
    sources: Sequence[Source],
    available: Mapping[str, int],
    *,
    seed: int,
    tokens: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The number of uses of each row, as a mapping of source name to int64 [rows of the source].

    A source has one of three settings.

    - `epochs: e` uses each row floor(e) times, and a fraction of the rows, drawn by the seed, once more.
      1,000 rows with `epochs: 2.5` give 2,500 rows. 500 of the rows are used three times and 500 twice.
    - `weight: w` requests a share among the sources with weights. Rows of these sources are never repeated,
      and as many as possible are used. So the scale is the smallest `available / weight`, and the source that
      has it is used completely. For example, `a` has 1,000 rows and weight 3, and `b` has 1,000 rows and
      weight 1. The scale is min(1000/3, 1000/1), so `a` gives 1,000 rows, and `b` gives 333 rows that the
      seed draws. To repeat a small source, set its epochs instead.
    - A source with neither uses each row once, as with `epochs: 1`.

    Sources with epochs do not change the scale of the weighted ones. If `c` has 200 rows and `epochs: 2`, the
    mixture above has 1000 + 333 + 400 rows. A weighted source gets at least one row. The drawn rows depend
    only on the seed and the source's name, and a larger number of epochs or weight keeps all of them.

    tokens: the length of each row, int [rows] by source, or None. With it, weights are shares of the tokens.
    A source then gives drawn rows until it has its share, to the nearest row.

    Raises `ValueError` for a weighted source without rows, which would make the mixture empty, and for two
    sources of the same name.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"data.sources: the name(s) {', '.join(twice)} appear more than once; names must be unique"
        )
    weights = _weights(sources, available)
    rows = (
        _weighted_rows(weights, available) if tokens is None else _rows_of_tokens(weights, tokens, seed=seed)
    )
    for source in sources:
        if source.weight is None:
            rows[source.name] = round((source.epochs or 1.0) * available[source.name])
    return {name: _spread(rows[name], available[name], seed=seed, name=name) for name in names}


def shares(names: Sequence[str], uses: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> list[Share]:
    """The resulting mixture. uses: int [rows] of each source. lengths: int [rows] in real tokens."""
    rows = [int(count.sum()) for count in uses]
    tokens = [int(count @ length) for count, length in zip(uses, lengths, strict=True)]
    all_rows, all_tokens = max(sum(rows), 1), max(sum(tokens), 1)
    return [
        Share(name, len(count), row, token, row / all_rows, token / all_tokens)
        for name, count, row, token in zip(names, uses, rows, tokens, strict=True)
    ]


def _weights(sources: Sequence[Source], available: Mapping[str, int]) -> dict[str, float]:
    weights = {source.name: source.weight for source in sources if source.weight is not None}
    empty = [name for name in weights if available[name] == 0]
    if empty:
        raise ValueError(
            f"data.sources: {', '.join(empty)} has a weight but no usable row, and nothing weighted is "
            "repeated, so the mixture would be empty; remove the source or mend its rows"
        )
    return weights


def _weighted_rows(weights: Mapping[str, float], available: Mapping[str, int]) -> dict[str, int]:
    scale = min((available[name] / weight for name, weight in weights.items()), default=0.0)
    return {name: min(max(round(weight * scale), 1), available[name]) for name, weight in weights.items()}


def _rows_of_tokens(
    weights: Mapping[str, float], tokens: Mapping[str, np.ndarray], *, seed: int
) -> dict[str, int]:
    scale = min((tokens[name].sum() / weight for name, weight in weights.items()), default=0.0)
    rows = {}
    for name, weight in weights.items():
        # `_spread` draws the first rows of the same permutation.
        drawn = np.cumsum(tokens[name][permutation(len(tokens[name]), seed, name)])
        rows[name] = int(np.abs(drawn - weight * scale).argmin()) + 1
    return rows


def _spread(rows: int, available: int, *, seed: int, name: str) -> np.ndarray:
    if not available:
        return np.zeros(0, dtype=np.int64)
    uses = np.full(available, rows // available, dtype=np.int64)
    uses[permutation(available, seed, name)[: rows % available]] += 1
    return uses
