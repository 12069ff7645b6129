"""What can be asked of a machine without importing what may be broken."""

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import TypeVar

T = TypeVar("T")


def value_or(fallback: T, probe: Callable[[], T]) -> T:
    """The result of a probe, or `fallback` if it raises any error."""
    try:
        return probe()
    except Exception:
        return fallback


def is_found(module: str) -> bool:
    """Whether a module can be found. It is not imported."""
    return value_or(False, lambda: importlib.util.find_spec(module) is not None)


def installed_version(name: str) -> str:
    """The version of a distribution, "not installed", or the error in its metadata."""
    try:
        return metadata.version(name) or "installed, but its metadata names no version"
    except metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"unreadable: {error}"


def nccl_version() -> str:
    """The version of NCCL that torch uses. Empty without NCCL."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))
