"""Loads YAML files with a `base:` and dotted overrides, and reports all errors at once.

It reads every kind of settings file, namely of training runs, clusters, chains, rounds, generation,
selection, merging and cleaning.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_post.config.overrides import merged, with_overrides
from megatron_post.config.references import escaped, resolved
from megatron_post.config.schema import Config
from megatron_post.config.secrets import redact
from megatron_post.config.validation_errors import error_lines, errors_of, shown
from megatron_post.config.yaml_text import LARGEST, read_yaml, write_yaml
from megatron_post.storage.reading import plain_file, reading

Model = TypeVar("Model", bound=BaseModel)
SettingsSource = str | Path | Mapping[str, Any]  # a YAML file, or the keys and values of one
_MOST_LINES = 50  # the number of errors that a message lists


class ConfigError(ValueError):
    """A configuration cannot be used. The message lists every reason with its key and value.

    Text that looks like a secret is hidden.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def load_config(path: SettingsSource, overrides: Sequence[str] = ()) -> Config:
    """Read the config of a run and its bases, apply dotted overrides (`optimizer.lr=5e-7`), and validate it.

    path: a YAML file, or a mapping with its keys and values.

    Raises `ConfigError` for a missing file, broken YAML, an unknown key, a wrong value, and a layout that
    cannot work.
    """
    return load_section(Config, path, overrides)


def load_section(model: type[Model], path: SettingsSource, overrides: Sequence[str] = ()) -> Model:
    """Read a file of other settings, in the same way as `load_config`."""
    if isinstance(path, Mapping):
        return _completed(model, dict(path), overrides, origin=model.__name__)
    if not isinstance(path, str | Path):
        raise ConfigError(
            f"settings of {model.__name__} are a YAML file or a mapping of keys and values, not {path!r}"
        )
    return _completed(model, read_tree(path), overrides, origin=str(path))


def section_of(model: type[Model], settings: Model | SettingsSource) -> Model:
    """Settings that were given as an object of `model`, as a file or as a mapping."""
    return settings if isinstance(settings, model) else load_section(model, settings)  # type: ignore[arg-type]


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file merged over its bases, before references are replaced and before validation.

    Raises `ConfigError` for a file that cannot be read.
    """
    return _read(Path(path), seen=())


def validate(values: dict[str, Any], overrides: Sequence[str] = (), *, origin: str) -> Config:
    """Make a `Config` of plain values and dotted overrides. `origin` is their name in a `ConfigError`."""
    return _completed(Config, values, overrides, origin=origin)


def parse(model: type[Model], values: Any, *, origin: str) -> Model:
    """Make a pydantic model of plain values. `origin` is their name in a `ConfigError` with all errors."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = errors_of(error)
        lines = [line for item in found[:_MOST_LINES] for line in error_lines(item, model)]
        text = _listed(lines, origin, others=len(found[_MOST_LINES:]))
    raise ConfigError(text)


def raise_for(errors: Sequence[str], origin: str = "") -> None:
    """Raise a `ConfigError` that lists all of `errors`, if there are any."""
    if errors:
        raise ConfigError(_listed(errors, origin))


def to_yaml(settings: BaseModel | dict[str, Any]) -> str:
    """The text of a YAML file with these settings."""
    values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
    return write_yaml(escaped(values))


def json_schema(model: type[BaseModel]) -> str:
    """The JSON schema of a file of settings, for editors. It describes every key."""
    return json.dumps(model.model_json_schema(), indent=2)


def _completed(model: type[Model], tree: dict[str, Any], overrides: Sequence[str], *, origin: str) -> Model:
    try:
        values = resolved(with_overrides(tree, overrides))
    except ValueError as error:
        raise ConfigError(_listed(str(error).splitlines(), origin)) from None
    return parse(model, values, origin=origin)


def _listed(errors: Sequence[str], origin: str, *, others: int = 0) -> str:
    """The message for a list of errors. others: the number of further errors, which are only counted."""
    count = len(errors) + others
    lines = [*errors[:_MOST_LINES], *([f"and {count - _MOST_LINES} more"] if count > _MOST_LINES else [])]
    head = f"{origin}: " if origin else ""
    return f"{head}{count} error(s)\n" + "\n".join(f"  - {line}" for line in lines)


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        with reading(path):
            plain_file(path, f"base of {seen[-1]}:" if seen else "config file")
            here = path.resolve()
            if here in seen:
                raise ValueError(f"config file {path} inherits from itself through `base:`")
            tree = _mapping(path)
            base = tree.pop("base", None)
            if base is not None and not (isinstance(base, str) and base.strip() and "\0" not in base):
                raise ValueError(f"{path}: base: must be the path of one YAML file, not {shown(base)}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return tree if base is None else merged(_read(path.parent / base, seen=(*seen, here)), tree)


def _mapping(path: Path) -> dict[str, Any]:
    """The content of one file, without its bases. Raises `ValueError` that names the file."""
    with path.open("rb") as file:
        data = file.read(4 * LARGEST + 1)  # a UTF-8 character has at most four bytes
    if len(data) > 4 * LARGEST:
        raise ValueError(
            f"{path}: it is too large for a file of settings, which holds {LARGEST:,} characters"
        )
    try:
        tree = read_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: not valid YAML: line {line}: a byte is not UTF-8; save it as UTF-8"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise ValueError(f"{path}: the top level must be a mapping, not {type(tree).__name__}")
    return tree or {}
