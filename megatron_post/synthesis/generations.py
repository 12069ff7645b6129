"""The input rows of a recipe whose next ones follow from what its last ones have found."""

from collections.abc import Sequence
from typing import Any

from megatron_post.config.section import Section
from megatron_post.synthesis.inputs import InputRow
from megatron_post.synthesis.recipe import Recipe
from megatron_post.synthesis.row import row_id


class GenerationRows:
    """The rows of one generation after the other.

    number: of the generation, from 1. rows: its rows with their numbers, which go on from generation to
    generation; empty once there is no further one.
    """

    def __init__(self, recipe: Recipe, own: Section, seeds: list[dict[str, Any]]) -> None:
        """own: the recipe's own settings. seeds: the rows of the input.

        Raises `ValueError` for seeds that the recipe refuses, and if its first generation has no rows.
        """
        assert recipe.generations is not None
        self._generator = recipe.generations(seeds, own)
        self.number, self._next_number = 1, 0
        self.rows = self._numbered(next(self._generator, []))
        if not self.rows:
            raise ValueError(f"recipe {recipe.name}: its first generation has no rows")

    def advance(self, found: list[dict[str, Any]]) -> None:
        """Go on to the next generation. found: by all rows of this one, in order."""
        self.number += 1
        try:
            self.rows = self._numbered(self._generator.send(found))
        except StopIteration:
            self.rows = []

    def _numbered(self, values: Sequence[dict[str, Any]]) -> list[tuple[int, InputRow]]:
        first = self._next_number
        self._next_number += len(values)
        return [
            (first + place, InputRow(row_id(each), each, f"generation {self.number}:{place + 1}"))
            for place, each in enumerate(values)
        ]
