"""The YAML of `megatron-post synthesize`."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from megatron_post.config.load import ConfigError, load_section, parse, raise_for
from megatron_post.config.section import Count, Line, Name, Section, Whole
from megatron_post.inference.request import Sampling
from megatron_post.inference.settings import BackendSettings
from megatron_post.sandbox.settings import Bubblewrap, SandboxSettings
from megatron_post.storage.reading import did_you_mean
from megatron_post.synthesis.inputs import InputSettings
from megatron_post.synthesis.recipe import Recipe


class SynthesisModel(Section):
    """One of the models that a recipe asks."""

    model: Name = Field(description="Hugging Face directory; with a server, a name for the record")
    backend: BackendSettings = Field(description="who answers")
    sampling: Sampling = Field(Sampling(), description="how it answers where the recipe does not say")


class Synthesis(Section):
    """A synthesis file."""

    recipe: Name = Field(description="name of a built-in recipe, or path of a Python file")
    settings: dict[str, Any] = Field(default_factory=dict, description="keys of the recipe's own")
    input: InputSettings
    models: dict[Line, SynthesisModel | Line] = Field(
        min_length=1, description="name -> model that the recipe asks by this name, or another name here"
    )
    sandbox: SandboxSettings = Bubblewrap()
    rows_in_flight: Count = Field(256, le=100_000, description="input rows that a process works on at a time")
    max_failed: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the input rows, rounded up, that may fail; not all of them, unless it is 1",
    )
    max_bad_rows: Whole = Field(0, description="rows of the input that may be bad, and are left out")
    output: Name = Field(description="directory of the rows, the journal and the report")

    def own_name(self, name: str) -> str:
        """The entry of `models` that is asked by this name: its own, or the one that it names.

        Raises `ConfigError` if there is none.
        """
        wanted = name
        for _ in range(len(self.models) + 1):  # names that lead in a circle end
            found = self.models.get(name)
            if isinstance(found, SynthesisModel):
                return name
            if found is None:
                break
            name = found
        known = list(self.models)
        raise ConfigError(
            f"models: {self.recipe} asks {wanted!r}, and there is no such model{did_you_mean(name, known)}; "
            f"there are {', '.join(known)}"
        )

    def model_of(self, name: str) -> SynthesisModel:
        """The model that is asked by this name. Raises `ConfigError` if there is none."""
        found = self.models[self.own_name(name)]
        assert isinstance(found, SynthesisModel)
        return found


def load_synthesis(path: str, overrides: Sequence[str] = ()) -> Synthesis:
    """Read a synthesis file and dotted overrides. Raises `ConfigError` with every error at once."""
    return load_section(Synthesis, path, overrides)


def recipe_settings(settings: Synthesis, recipe: Recipe) -> Section:
    """The recipe's own settings. Raises `ConfigError` for models that it lacks or never asks, too."""
    for name in recipe.models:
        settings.own_name(name)
    asked = set(recipe.models) | {found for found in settings.models.values() if isinstance(found, str)}
    raise_for(
        [f"models.{name}: recipe {recipe.name} asks {', '.join(recipe.models)} and no others"
         for name in settings.models if name not in asked]
    )  # fmt: skip
    return parse(recipe.settings, settings.settings, origin=f"settings of recipe {recipe.name}")
