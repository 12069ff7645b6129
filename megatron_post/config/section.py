"""`Section`, the base class of every section of a YAML file, and the types of numbers and texts."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from megatron_post.display import printable

MOST = 2**31 - 1  # the largest whole number, because kernels and stores count in 32 bits
_LARGEST = 1e12  # the largest other number. fp32 must hold its square

Count = Annotated[int, Field(gt=0, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=_LARGEST)]


def one_line(text: str) -> str:
    """The text itself. Raises `ValueError` for control characters and other invisible characters."""
    if set(text) & set("\n\t") or printable(text) != text:
        raise ValueError(f"{text!r} holds a newline or another control character")
    return text


def _trimmed(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is blank; where there is none, leave the key out or write null")
    if text != text.strip():
        raise ValueError(f"{text!r} begins or ends with a blank; remove it")
    if text.startswith("~/") or text == "~":
        # A shell expands ~ only at the beginning of a word. So `run_dir=~/x` would create a directory named
        # ~.
        raise ValueError(f"{text!r} begins with ~, which only a shell expands; write the whole path")
    return text


def _distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(items)) < len(items):
        raise ValueError(f"{list(items)} names an item twice; leave one out")
    return items


Distinct = AfterValidator(_distinct)
Line = Annotated[str, Field(min_length=1), AfterValidator(one_line)]
# the name of a file, a dataset, a model and so on
Name = Annotated[str, Field(max_length=4096), AfterValidator(one_line), AfterValidator(_trimmed)]


class Section(BaseModel):
    """A section of the YAML. It is immutable, and an unknown key is an error.

    Values are not converted between types. `true`, "1", infinity and NaN are not numbers.
    """

    # pydantic's own message would print a secret that is in the wrong place. ConfigError hides it.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        """Turn YAML's lists into tuples, which are immutable."""
        if not isinstance(values, dict):
            return values
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
