"""The settings file of `megatron-post curate`."""

from collections.abc import Sequence

from pydantic import Field, model_validator

from megatron_post.config.data import Dataset, Reasoning
from megatron_post.config.load import load_section
from megatron_post.config.section import Count, Name, Section, Whole
from megatron_post.curation.mixture import Mixture
from megatron_post.curation.steps import AnyStep
from megatron_post.inference.settings import AskedModels, gpus_of
from megatron_post.storage.reading import did_you_mean


class Curation(Section):
    """A curation file."""

    run: Name = Field(description="directory of the columns, the journal, the selected rows and the report")
    seed: Whole = Field(0, description="seed of every random choice")
    sources: tuple[Dataset, ...] = Field(min_length=1, description="the rows, in the form of data.sources")
    reasoning: Reasoning = Field("refuse", description="as data.reasoning")
    models: AskedModels = Field(
        default_factory=dict, description="name -> model that steps ask by this name, or another name here"
    )
    steps: tuple[AnyStep, ...] = Field(min_length=1, description="the steps, in their order")
    mixture: Mixture | None = Field(
        None, description="categories of the selected rows, and the shares that they shall have"
    )
    max_bad_rows: Whole = Field(0, description="bad rows that are allowed. They are left out")
    max_failed: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the rows that a step may fail to annotate, rounded up. Only 1 allows all",
    )
    part_rows: Count = Field(
        8192, description="rows in each file of a column, which a process works on at a time"
    )
    rows_in_flight: Count = Field(
        256, le=100_000, description="rows that a process asks models about at once"
    )

    @model_validator(mode="after")
    def _names_are_known(self) -> "Curation":
        errors = [
            f"{what}: {name!r} is there twice; give each a name of its own"
            for what, names in (("sources", [s.name for s in self.sources]),
                                ("steps", [s.column for s in self.steps]))
            for name in dict.fromkeys(names) if names.count(name) > 1
        ]  # fmt: skip
        used: set[str] = set()
        sources = [source.name for source in self.sources]
        for number, step in enumerate(self.steps):
            before = [earlier.column for earlier in self.steps[:number]]
            errors += [
                f"steps.{number}: {step.column} reads the step {name!r}, which is not before it"
                + did_you_mean(name, before)
                for name in step.needs
                if name not in before
            ]
            errors += [
                f"steps.{number}: {step.column} asks {name!r}, which is not in models"
                + did_you_mean(name, list(self.models))
                for name in step.models
                if name not in self.models
            ]
            errors += [
                f"steps.{number}: {step.column} names the source {name!r}, which is not in sources"
                + did_you_mean(name, sources)
                for name in dict.fromkeys(step.named_sources)
                if name not in sources
            ]
            steps = {each.column: each for each in self.steps[:number]}
            errors += [f"steps.{number}: {step.column}: {error}" for error in step.errors_with(steps)]
            used |= {*step.models}
        if self.mixture is not None:
            errors += [f"mixture: {error}" for error in self.mixture.errors_with(self.steps, sources)]
        used_models = [self.models[name] for name in used if name in self.models]
        errors += [
            f"models.{name}: no step asks it; remove it"
            for name, model in self.models.items()
            if name not in used and model not in used_models
        ]
        if errors:
            raise ValueError("\n".join(errors))
        return self


def load_curation(path: str, overrides: Sequence[str] = ()) -> Curation:
    """Read a curation file and dotted overrides. Raises `ConfigError` with all errors at once."""
    return load_section(Curation, path, overrides)


def users_of_gpus(settings: Curation) -> list[str]:
    """The steps and the models that use GPUs of a process."""
    steps = [f"the step {step.column}" for step in settings.steps if step.uses_gpus]
    asked = {name for step in settings.steps for name in step.models}
    models = [name for name in settings.models if name in asked and gpus_of(settings.models[name].backend)]
    return steps + [f"the model {name}" for name in models]
