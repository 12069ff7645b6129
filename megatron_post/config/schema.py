"""The whole configuration of a training run."""

from pydantic import model_validator

from megatron_post.config.consistency import NEEDS, contradictions, without_effect
from megatron_post.config.layout import layout_errors
from megatron_post.config.sections import UncheckedConfig


class Config(UncheckedConfig):
    """A run, complete. `load_config` makes one; the resolved form is saved with every checkpoint."""

    @model_validator(mode="after")
    def _adds_up(self) -> "Config":
        errors = [*layout_errors(self), *contradictions(self), *without_effect(self, NEEDS)]
        if errors:
            raise ValueError("\n".join(errors))
        return self
