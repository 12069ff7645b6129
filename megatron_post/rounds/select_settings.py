"""The YAML of `megatron-post select`."""

from pydantic import Field, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.data import Rating
from megatron_post.config.rewards import Reward, list_errors, models_of
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
    scores: Name | dict[Name, Name] | None = Field(
        None,
        description="the scores that `score` wrote. With a list `reward`: the file of each of its models. "
        "null: the verifier selects",
    )


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
    reward: tuple[Reward, ...] = Field(
        (), description="rewards whose weighted sum ranks the responses. none: the scores of one reward model"
    )
    max_bad_rows: Whole = Field(0, description="bad rows of prompts that are allowed, as in `generate`")

    @model_validator(mode="after")
    def _can_rank(self) -> "Select":
        errors = without_effect(self, SELECTION_NEEDS) + list_errors(self.reward)
        errors += self._score_errors()
        scored = [s.scores is not None for s in self.samples]
        if not any(scored) and self.verifier is None:
            errors.append("without scores and a verifier there is no rule for the selection; give one")
        if any(scored) != all(scored):
            errors.append("either all samples have scores or none")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def _score_errors(self) -> list[str]:
        """A line for each file of samples whose scores do not fit the list of rewards."""
        models, errors = set(models_of(self.reward)), []
        for number, samples in enumerate(self.samples):
            key, scores = f"samples.{number}.scores", samples.scores
            if not models and isinstance(scores, dict):
                errors.append(f"{key} has a file for each model, and there is no list `reward`; give it")
            if not models:
                continue
            if not isinstance(scores, dict):
                errors.append(f"{key}: with a list `reward`, give the file of each model as {{model: file}}")
                continue
            if missing := sorted(models - scores.keys()):
                errors.append(f"{key} has no file of {', '.join(missing)}, which `reward` names")
            if unused := sorted(scores.keys() - models):
                errors.append(
                    f"{key} has a file of {', '.join(unused)}, which `reward` does not name; remove it"
                )
        return errors
