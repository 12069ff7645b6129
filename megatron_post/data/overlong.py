"""Units longer than a pack: refused, dropped or truncated, before any packing, and counted."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import round_up


class Fitting:
    """Applies `data.overlong` to the units of one source. `multiple`: what segments are padded to."""

    def __init__(
        self, name: str, *, overlong: Literal["error", "drop", "truncate"], capacity: int, multiple: int
    ) -> None:
        self._name = name
        self._overlong = overlong
        self._capacity = capacity
        self._multiple = multiple
        self._longest = (0, 0)
        self.dropped = 0
        self.truncated = 0

    def fit(self, unit: Sequence[Rendered], *, row: int) -> Sequence[Rendered] | None:
        """The unit, shortened if need be, or None if it is to be left out."""
        length = sum(round_up(len(segment), self._multiple) for segment in unit)
        if length <= self._capacity:
            return unit
        self._longest = max(self._longest, (length, row))
        shortened = _shortened(unit, self._capacity) if self._overlong == "truncate" else None
        if shortened is None:
            self.dropped += 1
        else:
            self.truncated += 1
        return shortened

    def check(self) -> None:
        """Raise `ValueError` if there were overlong units and the config wants none."""
        if self._overlong == "error" and self.dropped:
            length, row = self._longest
            raise ValueError(
                f"source {self._name!r}: {self.dropped} row(s) are longer than "
                f"data.pack_length={self._capacity} (the longest, row {row}, takes {length} tokens); raise "
                "data.pack_length, or set data.overlong to drop or truncate"
            )


def _shortened(unit: Sequence[Rendered], capacity: int) -> Sequence[Rendered] | None:
    """The start of a dialog, if there is still something to train. A shortened pair would be another pair."""
    if len(unit) > 1:
        return None
    tokens, roles = unit[0].tokens[:capacity], unit[0].roles[:capacity]
    return [Rendered(tokens, roles)] if np.isin(roles, (TokenRole.BODY, TokenRole.TERMINATOR)).any() else None
