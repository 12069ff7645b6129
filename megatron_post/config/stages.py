"""A table of the properties in which the stages differ.

A new stage needs a row here, a file in `stages/`, and YAML files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

StageName = Literal["sft", "reward", "step_reward", "dpo", "pretrain"]


@dataclass(frozen=True)
class Traits:
    """The properties of a stage.

    scalar_head: whether the model has a head with one score per token instead of the output layer.
    scores_steps: whether this head scores steps. It then has a bias, as Hugging Face's token classification
    has. examples: the kind of its rows. "preferences" have two or more ranked responses, "pairs" have a
    better and a worse one, "steps" have a label for each step, and "documents" are plain texts.
    has_reference: whether the loss can use a reference policy. trained_roles: the key that lists the roles of
    trained tokens, or None without such a key.
    """

    scalar_head: bool = False
    scores_steps: bool = False
    examples: Literal["dialogs", "preferences", "pairs", "steps", "documents"] = "dialogs"
    has_reference: bool = False
    trained_roles: str | None = None


STAGES: Mapping[StageName, Traits] = {
    "sft": Traits(trained_roles="loss.trained_roles"),
    "reward": Traits(scalar_head=True, examples="preferences"),
    "step_reward": Traits(scalar_head=True, scores_steps=True, examples="steps"),
    "dpo": Traits(examples="pairs", has_reference=True, trained_roles="dpo.trained_roles"),
    "pretrain": Traits(examples="documents"),
}
