"""YAML with a `base:` to inherit from, dotted overrides on top, every error at once."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from megatron_post.config.schema import Config
from megatron_post.config.secrets import HIDDEN, is_secret_name, redact
from megatron_post.storage.reading import plain_file, read_yaml_text

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every reason with its key and value, without
    what looks like a secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, its bases and dotted overrides (`optimizer.lr=5e-7`), and validate the result.

    Raises `ConfigError` for a missing file, broken YAML, an unknown key, a wrong value or an impossible
    layout.
    """
    return validate(read_tree(path), overrides, origin=str(path))


def read_tree(path: str | Path) -> DictConfig:
    """A YAML file merged over its bases, unvalidated. Raises `ConfigError` where one cannot be read."""
    return _read(Path(path), seen=())


def validate(values: Any, overrides: Sequence[str] = (), *, origin: str) -> Config:
    """Make a `Config` of plain values and dotted overrides; `origin` names them in the `ConfigError`."""
    return parse(Config, completed(values, overrides, origin=origin), origin=origin)


def completed(values: Any, overrides: Sequence[str] = (), *, origin: str) -> Any:
    """Plain values with dotted overrides on top, and all references resolved. Raises `ConfigError`."""
    malformed = [text for text in overrides if "=" not in text]
    if malformed:
        raise ConfigError(f"overrides must read key=value: {', '.join(malformed)}")
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}") from error


def parse(model: type[Model], values: Any, *, origin: str) -> Model:
    """Plain values as a pydantic model; `origin` names them in the `ConfigError`, which lists every error."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _describe(item)]
        text = _listed(lines, origin)
    raise ConfigError(text)


def raise_for(errors: Sequence[str], origin: str = "") -> None:
    """Raises `ConfigError` with all of these, if there are any."""
    if errors:
        raise ConfigError(_listed(errors, origin))


def _listed(errors: Sequence[str], origin: str) -> str:
    head = f"{origin}: " if origin else ""
    return f"{head}{len(errors)} error(s)\n" + "\n".join(f"  - {line}" for line in errors)


def to_yaml(config: Config) -> str:
    """The resolved config, ready to be loaded again."""
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(config.model_dump_json())))


def json_schema() -> str:
    """JSON schema of a config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _read(path: Path, *, seen: tuple[Path, ...]) -> DictConfig:
    try:
        plain_file(path, f"base of {seen[-1]}:" if seen else "config file")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if path.resolve() in seen:
        raise ConfigError(f"config file {path} inherits from itself through `base:`")
    try:
        tree = OmegaConf.load(io.StringIO(read_yaml_text(path)))
    except (YAMLError, ValueError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping")
    base = tree.pop("base", None)
    if base is None:
        return tree
    parent = _read(path.parent / str(base), seen=(*seen, path.resolve()))
    merged = OmegaConf.merge(parent, tree)
    assert isinstance(merged, DictConfig)
    return merged


def _describe(item: Any) -> list[str]:
    key = ".".join(str(part) for part in item["loc"])
    value = HIDDEN if any(is_secret_name(str(part)) for part in item["loc"]) else repr(item["input"])
    if item["type"] == "extra_forbidden":
        return [f"{key}: unknown key (value {value})"]
    if item["type"] == "missing":
        return [f"{key}: missing"]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return [f"{key}: {line}" if key else line for line in message.splitlines()]
    return [f"{key}: {message} (got {value})"]
