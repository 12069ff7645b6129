"""The list `reward`, which says how the scores of several reward models become one reward."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_post.config.data import Steps
from megatron_post.config.section import Distinct, Line, Name, NonNegative, Section
from megatron_post.storage.reading import did_you_mean

TRAINED = "trained"  # the reward model that a round trains
Threshold = Annotated[float, Field(ge=-1e12, le=1e12)]
DEFAULT = "default"  # the key of all capabilities that a mapping does not name
_SEPARATOR = Steps.model_fields["separator"].default


class Reward(Section):
    """One reward of a list, which one model gives, or an ensemble of several."""

    name: Line = Field(description="its name in rows and messages, such as helpfulness or safety")
    models: Annotated[tuple[Name, ...], Distinct] = Field(
        min_length=1,
        description="Hugging Face directories of reward models. `trained` in a round: the one that the round "
        "trains. In `select`: names of files in `scores`",
    )
    combine: Literal["mean", "min"] = Field(
        "mean", description="how the scores of several models are combined"
    )
    standardize: bool = Field(
        False,
        description="subtract each model's mean over all responses, and divide by its standard deviation. "
        "Reward models of whole responses have no common zero and no common scale",
    )
    of_steps: Literal["min", "product", "last"] | None = Field(
        None, description="the score of a response by a reward model of steps. null: a model of responses"
    )
    separator: str = Field(
        _SEPARATOR, min_length=1, description="data.steps.separator of a reward model of steps"
    )
    weight: NonNegative | dict[Line, NonNegative] = Field(
        1.0,
        description="weight in the sum of rewards. A mapping gives that of each capability, and `default` "
        "that of the others, which is 0 if it is absent",
    )
    at_least: Threshold | dict[Line, Threshold] | None = Field(
        None,
        description="a response with a lower score is never chosen, and is the rejected one of a pair. A "
        "mapping as in `weight`. null: no threshold",
    )

    def weight_of(self, capability: str) -> float:
        """The weight for prompts of a capability."""
        found = _of_capability(self.weight, capability)
        return 0.0 if found is None else found

    def least_of(self, capability: str) -> float | None:
        """The threshold for prompts of a capability, or None."""
        return _of_capability(self.at_least, capability)

    @property
    def capabilities(self) -> set[str]:
        """The capabilities that `weight` and `at_least` name."""
        mappings = [value for value in (self.weight, self.at_least) if isinstance(value, dict)]
        return {name for mapping in mappings for name in mapping} - {DEFAULT}

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Reward":
        errors = []
        if self.combine == "min" and len(self.models) == 1:
            errors.append(f"reward {self.name!r}: combine=min has no effect with one model")
        if self.of_steps is None and self.separator != _SEPARATOR:
            errors.append(f"reward {self.name!r}: separator has no effect without of_steps; set it")
        weights = self.weight.values() if isinstance(self.weight, dict) else [self.weight]
        if not any(weights) and self.at_least in (None, {}):
            errors.append(f"reward {self.name!r} has neither a weight nor a threshold; give one")
        if errors:
            raise ValueError("\n".join(errors))
        return self


@dataclass(frozen=True)
class Total:
    """The reward of a response.

    parts: the reward of each entry of the list. below: the entries whose reward is below their threshold.
    """

    value: float
    parts: Mapping[str, float]
    below: tuple[str, ...] = ()


def list_errors(rewards: Sequence[Reward]) -> list[str]:
    """A line for each error in a list of rewards."""
    names = [reward.name for reward in rewards]
    errors = [
        f"reward: {name!r} is there twice; names must be unique"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    separators: dict[str, str] = {}
    for reward in rewards:
        for model in reward.models if reward.of_steps else ():
            if separators.setdefault(model, reward.separator) != reward.separator:
                errors.append(f"reward {reward.name!r}: {model} has another separator elsewhere in the list")
    return errors


def models_of(rewards: Sequence[Reward]) -> dict[str, str | None]:
    """Every model of the list once, with its separator if it scores steps. Else the separator is None."""
    found: dict[str, str | None] = {}
    for reward in rewards:
        for model in reward.models:
            found[model] = reward.separator if reward.of_steps else found.get(model)
    return found


def check_capabilities(rewards: Sequence[Reward], known: Collection[str], *, origin: str) -> None:
    """Raise `ValueError` for a capability in the list that no prompt has. origin: the file of the prompts."""
    for reward in rewards:
        for name in sorted(reward.capabilities - {*known}):
            others = ", ".join(sorted(filter(None, known))) or "none"
            raise ValueError(
                f"reward {reward.name!r}: no prompt of {origin} has the capability {name!r}"
                f"{did_you_mean(name, list(known))}; its capabilities are: {others}"
            )


def score_of(line: Mapping[str, Any], reward: Reward, *, origin: str) -> float:
    """The score of the one response of a line that `score` wrote. Raises `ValueError`. origin: its file."""
    key = reward.of_steps or "scores"
    try:
        (score,) = line[key]
        if isinstance(score, bool) or not math.isfinite(score):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        wrong = ""
        if reward.of_steps is None and "steps" in line:
            wrong = "; the model scores steps, so its entry in the list `reward` needs of_steps"
        elif reward.of_steps is not None and "scores" in line:
            wrong = f"; the model scores responses, so leave out of_steps of reward {reward.name!r}"
        raise ValueError(f"{origin}: no score of one response: {str(line)[:100]}{wrong}") from None
    return float(score)


def combine(
    rewards: Sequence[Reward],
    scores: Sequence[Sequence[Sequence[float | None]]],
    capabilities: Sequence[str],
) -> list[Total | None]:
    """The total reward of each of n responses, or None for a response without scores.

    It is the sum of the rewards times their weights for the response's capability. scores: for each reward
    and each of its models the scores of the n responses, None for a blank one. Raises `ValueError` if no
    reward has a weight for a capability.
    """
    parts: list[list[float | None]] = []
    for reward, of_models in zip(rewards, scores, strict=True):
        values = [_standardized(each) if reward.standardize else list(each) for each in of_models]
        parts.append([_combined(reward, row) for row in zip(*values, strict=True)])
    for capability in dict.fromkeys(capabilities):
        if not any(reward.weight_of(capability) for reward in rewards):
            shown = f"the capability {capability!r}" if capability else "prompts without a capability"
            raise ValueError(
                f"reward: no entry has a weight for {shown}; give a weight to it, or to `default`"
            )
    totals: list[Total | None] = []
    for capability, row in zip(capabilities, zip(*parts, strict=True), strict=True):
        known = [(reward, value) for reward, value in zip(rewards, row, strict=True) if value is not None]
        if len(known) < len(rewards):
            totals.append(None)
            continue
        total = math.fsum(reward.weight_of(capability) * value for reward, value in known)
        least = {reward.name: reward.least_of(capability) for reward, _ in known}
        below = (r.name for r, value in known if (bound := least[r.name]) is not None and value < bound)
        totals.append(Total(total, {reward.name: value for reward, value in known}, tuple(below)))
    return totals


def _combined(reward: Reward, scores: Iterable[float | None]) -> float | None:
    known = list(scores)
    values = [score for score in known if score is not None]
    if len(values) < len(known):
        return None
    return min(values) if reward.combine == "min" else math.fsum(values) / len(values)


def _standardized(scores: Sequence[float | None]) -> list[float | None]:
    """Scores with mean 0 and standard deviation 1. Equal scores become 0."""
    known = [score for score in scores if score is not None]
    mean = math.fsum(known) / max(len(known), 1)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in known) / max(len(known), 1))
    return [None if score is None else (score - mean) / (deviation or 1.0) for score in scores]


def _of_capability(value: float | Mapping[str, float] | None, capability: str) -> float | None:
    if not isinstance(value, dict):
        return value  # type: ignore[return-value]
    return value.get(capability, value.get(DEFAULT))
