"""The YAML of `megatron-post merge`."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, model_validator

from megatron_post.config.load import SettingsSource, load_section, parse
from megatron_post.config.section import Name, NonNegative, Positive, Section, Whole

Method = Literal["linear", "ties", "slerp", "dare_ties"]
_WITH_BASE = ("ties", "dare_ties")


class LayerSetting(Section):
    """Another weight or density for the tensors that match a pattern."""

    tensors: Name = Field(description="pattern of Hugging Face names, such as `model.layers.1?.mlp.*`")
    weight: NonNegative | None = Field(None, description="weight of these tensors. null: the model's")
    density: float | None = Field(None, gt=0, le=1, description="density of these tensors. null: the model's")


class Ingredient(Section):
    """One model of a merge."""

    model: Name = Field(description="Hugging Face directory, or the trainer's checkpoint (run or step)")
    weight: NonNegative = Field(1.0, description="weight, relative to the other models")
    density: float = Field(1.0, gt=0, le=1, description="for ties and dare_ties, the share of deltas to keep")
    layers: tuple[LayerSetting, ...] = Field(
        (), description="the first pattern that matches a tensor decides"
    )

    def layer_of(self, tensor: str) -> LayerSetting | None:
        """The first pattern that matches a tensor."""
        return next((layer for layer in self.layers if fnmatchcase(tensor, layer.tensors)), None)

    def setting(self, tensor: str) -> tuple[float, float]:
        """(weight, density) for a tensor."""
        layer = self.layer_of(tensor) or LayerSetting(tensors=tensor)
        weight = self.weight if layer.weight is None else layer.weight
        return weight, self.density if layer.density is None else layer.density


class Merge(Section):
    """A merge file."""

    models: tuple[Ingredient, ...] = Field(min_length=2)
    base_model: Name | None = Field(
        None, description="for ties and dare_ties, the model from which the others were trained"
    )
    scale: Positive = Field(1.0, description="for ties and dare_ties, a factor of the merged delta")
    dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        None, description="number format of the output. null: the first model's"
    )
    seed: Whole = Field(0, description="for dare_ties, the seed of the random draws")


class MethodMerge(Merge):
    """A merge with its method, which the command line names."""

    method: Method = Field(description="the arithmetic, which the command line names")

    @model_validator(mode="after")
    def _fits_the_method(self) -> "MethodMerge":
        errors = []
        if self.method in _WITH_BASE and self.base_model is None:
            errors.append(f"{self.method} merges differences from a base; set `base_model`")
        if self.method not in _WITH_BASE:
            if self.base_model is not None:
                errors.append(f"base_model={self.base_model}: {self.method} has none")
            if self.scale != 1:
                errors.append(f"scale={self.scale}: {self.method} has none")
            densities = [d for m in self.models for d in (m.density, *(layer.density for layer in m.layers))]
            if any(density not in (None, 1.0) for density in densities):
                errors.append(f"{self.method} has no density")
        if self.method != "dare_ties" and self.seed != 0:
            errors.append(f"seed={self.seed}: {self.method} draws nothing, only dare_ties does")
        if self.method == "slerp" and len(self.models) != 2:
            errors.append(f"slerp merges two models, not {len(self.models)}")
        if errors:
            raise ValueError("\n".join(errors))
        return self


def load_merge(path: SettingsSource, method: Method) -> MethodMerge:
    """Read a merge file, or its keys and values. Raises `ConfigError` with every error at once."""
    plan = load_section(Merge, path)
    origin = "merge" if isinstance(path, Mapping) else str(path)
    return parse(MethodMerge, plan.model_dump() | {"method": method}, origin=origin)
