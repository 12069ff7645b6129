"""The YAML of `megatron-post synthesize`."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from megatron_post.config.load import load_section, parse, raise_for
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
    models: dict[Line, SynthesisModel] = Field(
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

    @field_validator("models", mode="before")
    @classmethod
    def _names_stand_for_models(cls, models: Any) -> Any:
        """`judge: author` gives the judge the values of the author."""
        if not isinstance(models, dict):
            return models
        models = {name: models.get(value, value) if isinstance(value, str) else value
                  for name, value in models.items()}  # fmt: skip
        for name, value in models.items():
            if isinstance(value, str):
                raise ValueError(
                    f"{name}: {value!r} is not the name of a model here{did_you_mean(value, list(models))}"
                )
        return models

    def own_name(self, name: str) -> str:
        """The first name of the model that is asked by this name. Equal models share a backend."""
        return next(other for other, model in self.models.items() if model == self.models[name])


def load_synthesis(path: str, overrides: Sequence[str] = ()) -> Synthesis:
    """Read a synthesis file and dotted overrides. Raises `ConfigError` with every error at once."""
    return load_section(Synthesis, path, overrides)


def recipe_settings(settings: Synthesis, recipe: Recipe) -> Section:
    """The recipe's own settings. Raises `ConfigError` for models that it lacks or never asks, too."""
    models, asks = settings.models, f"recipe {recipe.name} asks"
    used = [models[name] for name in recipe.models if name in models]
    errors = [
        f"models: {asks} {name!r}, which is missing{did_you_mean(name, list(models))}"
        for name in recipe.models
        if name not in models
    ]
    errors += [
        f"models.{name}: {asks} {', '.join(recipe.models)} and no others"
        for name, model in models.items()
        if name not in recipe.models and model not in used
    ]
    raise_for(errors)
    return parse(recipe.settings, settings.settings, origin=f"settings of recipe {recipe.name}")
