"""What distinguishes the stages from each other, in one table.

A new stage is a row here, a file in `stages/` and its YAML files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

StageName = Literal["sft", "reward", "dpo"]


@dataclass(frozen=True)
class Traits:
    """scalar_head: the model has a head that gives one score for each token, in place of the output layer.

    examples: what a row is. "preferences" have two or more ranked responses, "pairs" one that is better than
    the other. has_reference: the loss can compare with a reference policy. trained_roles: the key of the
    roles whose tokens are trained; None where the loss has no tokens.
    """

    scalar_head: bool = False
    examples: Literal["dialogs", "preferences", "pairs"] = "dialogs"
    has_reference: bool = False
    trained_roles: str | None = None


STAGES: Mapping[StageName, Traits] = {
    "sft": Traits(trained_roles="loss.trained_roles"),
    "reward": Traits(scalar_head=True, examples="preferences"),
    "dpo": Traits(examples="pairs", has_reference=True, trained_roles="dpo.trained_roles"),
}
