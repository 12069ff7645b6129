"""The YAML of `megatron-post select`."""

from pydantic import Field, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.data import Rating
from megatron_post.config.section import Name, NonNegative, Section, Whole
from megatron_post.rounds.verifier import VerifierSettings

# what has an effect in a `Selection`
SELECTION_NEEDS = (
    Needs("verifier_weight", "verifier"),
    Needs("only_correct", "verifier"),
    Needs("train_edited", "verifier"),
    Needs("seed", "cleaning"),
)


class Samples(Section):
    """A file of `generate` with its scores."""

    responses: Name = Field(description="a file that `generate` wrote")
    scores: Name | None = Field(None, description="the scores that `score` wrote. null: the verifier selects")


class Selection(Section):
    """How responses are chosen."""

    verifier: VerifierSettings | None = None
    verifier_weight: NonNegative = Field(
        10.0, description="added to the reward of a response that the verifier accepts"
    )
    tie: NonNegative = Field(0.0, description="scores that differ by no more than this are equal")
    only_correct: bool = Field(True, description="with a verifier, train SFT only on right responses")
    train_edited: bool = Field(
        False, description="if no response is right, train SFT on the verifier's solution"
    )
    ratings: dict[Rating, NonNegative] = Field(
        default={
            "marginally_better": 0.0,
            "slightly_better": 0.5,
            "better": 1.0,
            "significantly_better": 2.0,
        },
        description="least margin of each rating",
    )
    cleaning: Name | None = Field(None, description="YAML file of rules for the SFT set")
    seed: Whole = Field(0, description="seed of the choice among rows that a cleaning rule drops")


class Select(Selection):
    """A selection file."""

    prompts: Name = Field(description="the file of prompts that `generate` has answered")
    samples: tuple[Samples, ...] = Field(min_length=1)
    max_bad_rows: Whole = Field(0, description="bad rows of prompts that are allowed, as in `generate`")

    @model_validator(mode="after")
    def _can_rank(self) -> "Select":
        errors = without_effect(self, SELECTION_NEEDS)
        scored = [s.scores is not None for s in self.samples]
        if not any(scored) and self.verifier is None:
            errors.append("without scores and a verifier there is no rule for the selection; give one")
        if any(scored) != all(scored):
            errors.append("either all samples have scores or none")
        if errors:
            raise ValueError("\n".join(errors))
        return self
