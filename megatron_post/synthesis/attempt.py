"""Runs a recipe on one input row. The result has rows, or the reason why there are none."""

import asyncio
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.config.section import Section
from megatron_post.data.dialog import BadRow
from megatron_post.inference.model import Refused
from megatron_post.storage.files import DiskFull
from megatron_post.synthesis.inputs import InputRow
from megatron_post.synthesis.parts import Drop, Result
from megatron_post.synthesis.recipe import Dropped, Recipe
from megatron_post.synthesis.resources import Resources
from megatron_post.synthesis.row import Found, PreferenceRow, Row, StepLabels
from megatron_post.synthesis.settings import Synthesis
from megatron_post.synthesis.task import Event, Task

_REFUSED = "`data pack` would refuse the row"


async def attempt(
    recipe: Recipe, settings: Synthesis, own: Section, resources: Resources, number: int, row: InputRow
) -> Result:
    """Run a recipe on one input row. own: the recipe's own settings.

    Raises only the errors that end a run. These are `DiskFull` and the error of a backend or a sandbox that
    does not work.
    """
    task = Task(row, own, recipe.prompts, resources)
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    dropped = None
    try:
        made = await recipe.run(row.values, task)
        if recipe.generations is not None:
            found = [each.as_json() for each in made if isinstance(each, Found)]
            made = [each for each in made if not isinstance(each, Found)]
        rows = _good_rows(recipe, settings, row, made, task, has_found=bool(found))
        if not rows and not found:
            raise Dropped("the recipe made no row")
    except Dropped as error:
        dropped = Drop(task.step_of(error), error.reason, error.detail)
    except BadRow as error:
        dropped = Drop(task.step_of(error), _REFUSED, str(error))
    except Refused as error:
        dropped = Drop(task.step_of(error), "refused by a model", error.reason, failed=True)
    except DiskFull:
        raise
    # An error in the recipe drops its row and does not end the run.
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if _is_cancelled():
            raise
        resources.raise_if_broken()
        dropped = Drop(
            task.step_of(error), f"{type(error).__name__} in the recipe", _last_line(error), failed=True
        )
    resources.raise_if_broken()
    if dropped:
        return Result(number, row.id, row.source, [], dropped, task.events)
    return Result(number, row.id, row.source, rows, None, task.events, found, task.measures)


def _good_rows(
    recipe: Recipe,
    settings: Synthesis,
    row: InputRow,
    made: Sequence[Any],
    task: Task[Any],
    *,
    has_found: bool,
) -> list[dict[str, Any]]:
    """The rows in JSON. The report counts those that `data pack` would refuse.

    Raises `BadRow` if it would refuse all of them, and the recipe found nothing for the next generation.
    """
    rows, errors = [], []
    for each in made:
        try:
            rows.append(_as_json(recipe, settings, row, each, task.events))
        except BadRow as error:
            errors.append(error)
    if errors and not rows and not has_found:
        raise errors[0]
    for _ in errors:
        task.count("rows", _REFUSED)
    return rows


def _as_json(
    recipe: Recipe,
    settings: Synthesis,
    row: InputRow,
    made: Row | PreferenceRow | StepLabels | Found,
    events: list[Event],
) -> dict[str, Any]:
    if not isinstance(made, Row | PreferenceRow | StepLabels):
        raise TypeError(
            "a recipe returns a list of `Row`, `PreferenceRow` or `StepLabels`, and not of "
            f"{type(made).__name__}"
        )
    return made.as_json(
        {
            "recipe": recipe.name,
            "version": recipe.version,
            "source": row.source,
            "parents": [row.id],
            "models": {event.model: settings.models[event.model].model for event in events if event.model},
            "journal": [dict(vars(event)) for event in events],
        }
    )


def _is_cancelled() -> bool:
    """Whether the run cancels this row, so that `CancelledError` does not come from the recipe itself."""
    running = asyncio.current_task()
    return running is not None and running.cancelling() > 0


def _last_line(error: BaseException) -> str:
    """The last line of a traceback, with the file and line that raised the error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{traceback.format_exception_only(error)[-1].strip()} ({Path(frame.filename).name}:{frame.lineno})"
    )
