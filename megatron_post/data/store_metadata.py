"""Reads the settings of packed stores, and finds what interrupted writers have left beside them."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_post.data.store_checksums import StoreError
from megatron_post.data.store_format import FORMAT, VERSION, StoreSettings
from megatron_post.storage.reading import read_object, reading


def read_settings(path: str | Path) -> StoreSettings:
    """The settings of a store. Raises `StoreError` if `path` is not a store of this format and version."""
    path = Path(path)
    if not path.exists():
        aside = ", ".join(map(str, leftovers(path, "replaced")))
        if aside:
            raise StoreError(
                f"data.store={path}: `megatron-post data pack` was interrupted when it replaced the store; "
                f"run it again, or rename the earlier store back, which is {aside}"
            )
        raise StoreError(f"data.store={path}: there is no store; run `megatron-post data pack` first")
    attributes = read_attributes(path)
    if attributes.get("version") != VERSION:
        raise StoreError(
            f"data.store={path} has format version {attributes.get('version')}, this program reads "
            f"{VERSION}; run `megatron-post data pack` again"
        )
    with damage(path):
        values = {item.name: attributes[item.name] for item in dataclasses.fields(StoreSettings)}
        return StoreSettings(**values | {"content_tokens": tuple(values["content_tokens"])})


def read_attributes(path: Path) -> dict[str, Any]:
    """The root attributes of a store of any version. Raises `StoreError` if `path` is not a store."""
    try:
        attributes = read_object(path / "zarr.json", "the metadata of a packed store").get("attributes")
        if not isinstance(attributes, dict):
            raise ValueError(f"{path / 'zarr.json'} has no attributes")
    except ValueError as error:
        raise StoreError(f"data.store={path} exists, but is not a packed store: {error}") from error
    if attributes.get("format") != FORMAT:
        raise StoreError(f"data.store={path} is a zarr directory, but not a packed store")
    return attributes


def leftovers(path: Path, kind: Literal["partial", "replaced"]) -> list[Path]:
    """The directories `.NAME.PROCESS.KIND` that writers of the store at `path` have left beside it.

    Another store's name may begin with this store's name. So PROCESS must consist of digits only.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.{kind}", re.ASCII)
    return [entry for entry in path.parent.glob(".*") if name.fullmatch(entry.name)]


@contextlib.contextmanager
def damage(path: Path, remedy: str = "run `megatron-post data pack` again") -> Iterator[None]:
    """Turn every error that damaged metadata and arrays cause into a `StoreError` with the remedy."""
    try:
        with reading(path, "an intact part of a packed store"):
            yield
    except StoreError:
        raise
    except ValueError as error:
        raise StoreError(f"{error}; {remedy}") from error
