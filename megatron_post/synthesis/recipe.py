"""Loads recipes. A recipe is a module in `recipes/` or a Python file of the user.

A recipe is a file:

    VERSION = 1                          # a higher number sends all requests of the recipe again
    MODELS = ("author", "judge")         # names under `models` that it asks; by default "author" alone
    SANDBOX = True                       # whether it runs programs; by default it does not
    ANSWERS = True                       # whether it compares mathematical answers; by default it does not

    class Settings(Section): ...         # its own keys, under `settings` of the YAML (optional)

    async def recipe(
        row: dict[str, Any], task: Task[Settings]
    ) -> list[Row | PreferenceRow | StepLabels]: ...

    def generations(seeds: list[dict[str, Any]], settings: Settings) -> Generator[Values, Values, None]:
        found = yield [{...}, ...]       # the input rows of a generation, from the rows of the input at first
        ...                              # found: the values of each `Found` that `recipe` returned, in order

    def prepare(settings: Settings) -> Prepared | None:
        return Index(settings)           # made once in each process, before its first row: `task.prepared`

`generations` and `prepare` may be left out, and usually are. Without `generations`, the rows of the input are
the only generation.

The first line of its docstring says what it makes. Its prompts are `NAME.j2` in a directory beside the file,
which has the file's name without `.py`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_post.config.section import Section
from megatron_post.storage.checksums import sha256_of_file
from megatron_post.storage.reading import did_you_mean, plain_file
from megatron_post.synthesis import recipes
from megatron_post.synthesis.prompts import Prompts
from megatron_post.synthesis.row import Found, PreferenceRow, Row, StepLabels, check_texts

Values = list[dict[str, Any]]
_BUILT_IN = Path(recipes.__file__).parent


class Dropped(Exception):
    """Raised by a recipe to drop its input row.

    reason: the report counts rows by this text, so rows with the same problem need the same text. detail:
    text about this row alone.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        check_texts(reason=reason, detail=detail)
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Prepared(Protocol):
    """What all rows of a recipe share, such as an index.

    checksum: of everything in it that rows depend on. A run whose checksum changes makes its rows again.
    """

    checksum: str


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been loaded.

    run: called with the values of an input row and a `Task`. checksums: of the recipe's file and its prompts.
    generations: called with the rows of the input and the recipe's settings. It yields the values of the
    input rows of each generation. None: the input is the only generation.
    prepare: called with the recipe's settings, once in each process. It raises `ValueError` for wrong ones.
    """

    name: str
    version: int
    summary: str
    models: tuple[str, ...]
    runs_programs: bool
    compares_answers: bool
    settings: type[Section]
    run: Callable[[dict[str, Any], Any], Awaitable[Sequence[Row | PreferenceRow | StepLabels | Found]]]
    generations: Callable[[list[dict[str, Any]], Any], Generator[Values, Values, None]] | None
    prepare: Callable[[Any], Prepared | None] | None
    prompts: Prompts
    checksums: dict[str, str]


def built_in_recipes() -> list[str]:
    """The names of the built-in recipes, sorted."""
    return sorted(file.stem for file in _BUILT_IN.glob("*.py") if not file.stem.startswith("_"))


def load_recipe(name: str) -> Recipe:
    """Load a recipe. Raises `ValueError` if it cannot be found or loaded.

    name: the name of a built-in recipe, or the path of a Python file, which is executed.
    """
    if name.endswith(".py"):
        file = plain_file(Path(name), "recipe")
        return _recipe(_from_file(file), file)
    known = built_in_recipes()
    if name not in known:
        raise ValueError(
            f"recipe={name}: no recipe has this name{did_you_mean(name, known)}; there are "
            f"{', '.join(known) or 'none'}. A recipe of your own is the path of a file that ends in .py"
        )
    return _recipe(importlib.import_module(f"{recipes.__name__}.{name}"), _BUILT_IN / f"{name}.py")


def _from_file(file: Path) -> ModuleType:
    name = f"synthesis_recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look up annotations there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ValueError(f"recipe {file}: it cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _recipe(module: ModuleType, file: Path) -> Recipe:
    """The recipe that a module defines. Raises `ValueError` if the module is not a recipe."""
    run, settings = getattr(module, "recipe", None), getattr(module, "Settings", Section)
    version, models = getattr(module, "VERSION", None), getattr(module, "MODELS", ("author",))
    sandbox, answers = getattr(module, "SANDBOX", False), getattr(module, "ANSWERS", False)
    generations, prepare = getattr(module, "generations", None), getattr(module, "prepare", None)
    wrong = {
        "`async def recipe(row, task)`": not inspect.iscoroutinefunction(run)
        or len(inspect.signature(run).parameters) != 2,
        "VERSION, a whole number from 1": type(version) is not int or version < 1,
        "MODELS, a tuple of names": not isinstance(models, tuple)
        or not all(isinstance(model, str) and model for model in models),
        "SANDBOX, True or False": not isinstance(sandbox, bool),
        "ANSWERS, True or False": not isinstance(answers, bool),
        "generations, a generator with two arguments": generations is not None
        and (
            not inspect.isgeneratorfunction(generations)
            or len(inspect.signature(generations).parameters) != 2
        ),
        "prepare, a function with one argument": prepare is not None
        and (not inspect.isfunction(prepare) or len(inspect.signature(prepare).parameters) != 1),
        "Settings, a `Section`": not (isinstance(settings, type) and issubclass(settings, Section)),
    }
    if missing := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"recipe {file}: it needs {'; '.join(missing)}. docs/synthesis/own_recipe.md has an example"
        )
    assert run is not None and isinstance(version, int)
    prompts = Prompts(file.with_suffix(""))
    return Recipe(
        name=file.stem,
        version=version,
        summary=(module.__doc__ or "").strip().partition("\n")[0],
        models=models,
        runs_programs=sandbox,
        compares_answers=answers,
        settings=settings,
        run=run,
        generations=generations,
        prepare=prepare,
        prompts=prompts,
        checksums={file.name: sha256_of_file(file), **prompts.checksums},
    )
