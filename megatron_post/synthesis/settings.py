"""The settings file of `megatron-post synthesize`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.load import ConfigError, load_section, parse, raise_for
from megatron_post.config.section import Count, Line, Name, Section, Whole
from megatron_post.inference.settings import AskedModels, ServerBackend
from megatron_post.sandbox.settings import Bubblewrap, SandboxSettings
from megatron_post.storage.reading import did_you_mean
from megatron_post.synthesis.inputs import InputSettings
from megatron_post.synthesis.recipe import Recipe, built_in_recipes

_SERVERS = "servers"  # a directory in the output


class Serve(Section):
    """vLLM servers that `launch synthesize` starts for a run, as a Slurm array of their own."""

    model: Name = Field(description="Hugging Face directory or hub id of the model that is served")
    servers: Count = Field(1, description="servers, each of which is a Slurm job")
    nodes: Count = Field(1, description="nodes of one server, which are its pipeline stages")
    gpus: Count = Field(8, description="GPUs of each node, over which a server's tensors are split")
    image: Name | None = Field(
        None, description="container image that has vLLM; null takes that of the cluster file"
    )
    arguments: tuple[Line, ...] = Field((), description="more arguments of `vllm serve`")
    command: tuple[Line, ...] | None = Field(
        None,
        min_length=1,
        description="another server with OpenAI's interface and vLLM's /health. {model}, {served_model}, "
        "{port}, {host} and {rank} are filled in, and the key is in VLLM_API_KEY",
    )

    @model_validator(mode="after")
    def _arguments_are_used(self) -> "Serve":
        if self.command is not None and self.arguments:
            raise ValueError("arguments: they have no effect with command; write them there")
        return self


class Synthesis(Section):
    """A synthesis file."""

    recipe: Name = Field(description="name of a built-in recipe, or path of a Python file")
    settings: dict[str, Any] = Field(default_factory=dict, description="the recipe's own keys")
    input: InputSettings
    models: AskedModels = Field(
        default_factory=dict,
        description="name -> model that the recipe asks by this name, or another name here",
    )
    sandbox: SandboxSettings = Bubblewrap()
    serve: Serve | None = Field(None, description="servers that `launch synthesize` starts")
    rows_in_flight: Count = Field(256, le=100_000, description="input rows that a process works on at a time")
    max_failed: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the input rows that may fail, rounded up. Only 1 allows all of them to fail",
    )
    max_bad_rows: Whole = Field(0, description="bad input rows that are allowed. They are skipped")
    output: Name = Field(description="directory of the rows, the journal and the report")

    @model_validator(mode="before")
    @classmethod
    def _ask_own_servers(cls, values: Any) -> Any:
        """With `serve`, a server without a url means the servers that are started for the run."""
        if not isinstance(values, dict) or values.get("serve") is None:
            return values
        models = dict(values["models"]) if isinstance(values.get("models"), dict) else {}
        for name, model in models.items():
            backend = model.get("backend") if isinstance(model, dict) else None
            if (
                isinstance(backend, dict)
                and backend.get("kind") == "server"
                and backend.get("url") is None
                and backend.get("urls_from") is None
            ):
                directory = str(Path(str(values.get("output"))) / _SERVERS)
                models[name] = {**model, "backend": {**backend, "urls_from": directory}}
        return {**values, "models": models} if models else values

    @model_validator(mode="after")
    def _servers_are_asked(self) -> "Synthesis":
        if self.serve is not None and len({model.served_model for model in self._served()}) != 1:
            raise ValueError(
                "serve: no model asks the servers that it starts, or several do by different names. Leave "
                "url and urls_from of the backend of one model out"
            )
        return self

    @property
    def servers(self) -> Path:
        """The directory in which the servers of `serve` publish their addresses."""
        return Path(self.output) / _SERVERS

    @property
    def served_model(self) -> str:
        """The model name in requests to the servers of `serve`."""
        return self._served()[0].served_model

    def _served(self) -> list[ServerBackend]:
        """The backends that send requests to the servers of `serve`."""
        return [
            backend
            for backend in (model.backend for model in self.models.values())
            if isinstance(backend, ServerBackend)
            and backend.urls_from is not None
            and Path(backend.urls_from) == self.servers
        ]

    def own_name(self, name: str) -> str:
        """The first name that has the same model as this name. Equal models share a backend."""
        return next(other for other, model in self.models.items() if model == self.models[name])


def load_synthesis(path: str, overrides: Sequence[str] = ()) -> Synthesis:
    """Read a synthesis file and dotted overrides. Raises `ConfigError` with all errors at once."""
    if path in built_in_recipes() and not Path(path).exists():
        raise ConfigError(
            f"{path} is a recipe, and this command reads a YAML file that has `recipe: {path}`; "
            "copy one of configs/synthesis"
        )
    return load_section(Synthesis, path, overrides)


def recipe_settings(settings: Synthesis, recipe: Recipe) -> Section:
    """The recipe's own settings.

    Raises `ConfigError` if they are wrong, if a model is missing, or if the recipe never uses a model.
    """
    models, asks = settings.models, f"recipe {recipe.name} asks"
    used = [models[name] for name in recipe.models if name in models]
    errors = [
        f"models: {asks} {name!r}, which is missing{did_you_mean(name, list(models))}"
        for name in recipe.models
        if name not in models
    ]
    errors += [
        f"models.{name}: {asks} {', '.join(recipe.models)} and no others; remove it"
        for name, model in models.items()
        if name not in recipe.models and model not in used
    ]
    raise_for(errors)
    return parse(recipe.settings, settings.settings, origin=f"settings of recipe {recipe.name}")
