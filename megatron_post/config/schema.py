"""`Config`, the whole configuration of a training run, which is checked for contradictions."""

from pydantic import model_validator

from megatron_post.config.consistency import NEEDS, contradictions, without_effect
from megatron_post.config.layout import layout_errors
from megatron_post.config.sections import UncheckedConfig


class Config(UncheckedConfig):
    """The config of a run. `load_config` makes it, and every checkpoint contains its resolved form."""

    @model_validator(mode="after")
    def _adds_up(self) -> "Config":
        # These checks compare sections, so they run after every section is valid. All errors are reported at
        # once.
        errors = [*layout_errors(self), *contradictions(self), *without_effect(self, NEEDS)]
        if errors:
            raise ValueError("\n".join(errors))
        return self
