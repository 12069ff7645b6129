"""`data.overlong` decides whether a unit that is longer than a pack is an error, dropped or truncated."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_post.data.template import STEP_ROLES, Rendered, TokenRole
from megatron_post.data.units import round_up


class LengthLimit:
    """Applies `data.overlong` to the units of one source and counts them.

    capacity: tokens of a pack. multiple: each segment is padded to a multiple of it.
    """

    def __init__(
        self, name: str, *, overlong: Literal["error", "drop", "truncate"], capacity: int, multiple: int
    ) -> None:
        self._name = name
        self._overlong = overlong
        self._capacity = capacity
        self._multiple = multiple
        self.longest = (0, 0)  # tokens and row number of the longest overlong unit
        self.dropped = 0
        self.truncated = 0

    def fit(self, unit: Sequence[Rendered], *, row: int) -> Sequence[Rendered] | None:
        """The unit, truncated if necessary, or None if it is left out."""
        length = sum(round_up(len(segment), self._multiple) for segment in unit)
        if length <= self._capacity:
            return unit
        self.longest = max(self.longest, (length, row))
        shortened = _shortened(unit, self._capacity) if self._overlong == "truncate" else None
        if shortened is None:
            self.dropped += 1
        else:
            self.truncated += 1
        return shortened

    def add(self, *, dropped: int, truncated: int, longest: tuple[int, int]) -> None:
        """Add the counts of another limit of the same source."""
        self.dropped += dropped
        self.truncated += truncated
        self.longest = max(self.longest, longest)

    def check(self) -> None:
        """Raise `ValueError` if there were overlong units and `data.overlong` is "error"."""
        if self._overlong == "error" and self.dropped:
            length, row = self.longest
            raise ValueError(
                f"source {self._name!r}: {self.dropped} row(s) are longer than "
                f"data.pack_length={self._capacity} (the longest, row {row}, takes {length} tokens); raise "
                "data.pack_length, or set data.overlong to drop or truncate"
            )


def _shortened(unit: Sequence[Rendered], capacity: int) -> Sequence[Rendered] | None:
    """The first `capacity` tokens of a dialog, or None if none of them is trained.

    A preference is never truncated. Its shortened responses would be other responses, which nobody compared.
    """
    if len(unit) > 1:
        return None
    tokens, roles = unit[0].tokens[:capacity], unit[0].roles[:capacity]
    has_steps = np.isin(unit[0].roles, STEP_ROLES).any()
    trained = STEP_ROLES if has_steps else (TokenRole.BODY, TokenRole.TERMINATOR)
    return [Rendered(tokens, roles)] if np.isin(roles, trained).any() else None
