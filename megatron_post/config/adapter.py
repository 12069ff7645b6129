"""`adapter`: the section of low-rank adapters, which are trained in place of the model's own weights."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_post.config.section import Count, Distinct, Name, Positive, Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _in_model_order(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    # The order of targets means nothing. A run may resume with another one.
    return tuple(sorted(targets, key=TARGETS.index))


class Adapter(Section):
    """Low-rank adapters. The model's own weights are frozen, except the head of a reward model."""

    kind: Literal["lora", "dora"] = Field(
        "lora",
        description="lora: W + alpha / rank x B A (arXiv:2106.09685). dora: its rows are also rescaled to "
        "trained lengths (arXiv:2402.09353)",
    )
    rank: Count = Field(16, description="rows of A and columns of B")
    alpha: Positive = Field(32.0, description="the update is multiplied by alpha / rank")
    targets: Annotated[tuple[Target, ...], Distinct, AfterValidator(_in_model_order)] = Field(
        TARGETS, min_length=1, description="the matrices that have an adapter, by their Hugging Face names"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of an adapter's inputs that are zeroed while it trains"
    )
    init_from: Name | None = Field(
        None, description="PEFT directory to start from. null: A is random, drawn by seed, and B is zero"
    )

    @property
    def scale(self) -> float:
        """The factor of the update B A."""
        return self.alpha / self.rank
