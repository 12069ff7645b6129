"""The versions that fit, and the command that installs an extra as this copy of the package was installed."""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

# the extras of setup.py; "" is the package without extras
Extra = Literal[
    "", "cuda", "dali", "generate", "curate", "synthesize", "wandb", "mlflow", "eval", "bench", "dev"
]
_NAME = "megatron-post"


@dataclass(frozen=True)
class Versions:
    """Versions of a package that this one is made for, from `first` to below `end`, with the reason."""

    first: tuple[int, ...]
    end: tuple[int, ...] | None
    reason: str
    extra: Extra = ""

    def __str__(self) -> str:
        first = ".".join(map(str, self.first))
        return f"{first} or newer" if self.end is None else f"{first} to below {'.'.join(map(str, self.end))}"


# What setup.py requires, and what the images of launchers/container must have.
VERSIONS = {
    "torch": Versions((2, 6), None, "older ones lack functions that are called here"),
    "megatron-core": Versions((0, 16, 1), (0, 17), "its interfaces differ between such versions"),
    "transformer-engine": Versions(
        (2, 9),
        (2, 12),
        "older ones lack FP8 recipes, newer ones refuse to read FP8's scales from a checkpoint",
        "cuda",
    ),
    "NCCL": Versions((2, 21), None, "torch 2.6 is built for that version"),
}


def unfit_versions(installed: Mapping[str, str]) -> list[str]:
    """Each of `VERSIONS` that is installed in another version, with the reason and the remedy.

    installed: versions by name. A text that begins with no number, such as "not installed", is skipped.
    """
    found = []
    for name, fits in VERSIONS.items():
        match = re.match(r"\d+(\.\d+)*", installed.get(name, ""))
        number = tuple(map(int, match[0].split("."))) if match else fits.first
        # 2.9 and 2.9.0 are the same version
        short = number + (0,) * (len(fits.first) - len(number))
        if short < fits.first or (fits.end is not None and number >= fits.end):
            remedy = "choose another build of torch" if name == "NCCL" else install_command(fits.extra)
            found.append(f"{name} {installed[name]} is not one of {fits}: {fits.reason}; {remedy}")
    return found


def installed_versions() -> dict[str, str]:
    """The versions of those of `VERSIONS` that pip has installed."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name) or ""
    return found


def install_command(extra: Extra = "") -> str:
    """A command line for a shell that installs the package with an extra.

    The package is not on an index. A checkout is installed from its directory, and any other copy from the
    source that pip has recorded. Transformer Engine is distributed as source and must be built with
    `--no-build-isolation`. In an isolated environment pip would build it for a torch that is not the
    installed one.
    """
    suffix = f"[{extra}]" if extra else ""
    words = ["pip", "install", *(["--no-build-isolation"] if extra == "cuda" else [])]
    checkout, origin = Path(__file__).resolve().parents[1], _origin()
    path = unquote(urlsplit(origin["url"]).path) if origin["url"].startswith("file:") else ""
    if (checkout / "setup.py").is_file():
        words += ["-e", f"{checkout}{suffix}"]
    elif path:
        words += [*(["-e"] if origin.get("dir_info", {}).get("editable") else []), f"{path}{suffix}"]
    elif "vcs_info" in origin:
        vcs = origin["vcs_info"]
        words += [f"{_NAME}{suffix} @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"]
    else:
        words += [f"{_NAME}{suffix}" + (f" @ {origin['url']}" if origin["url"] else "")]
    return shlex.join(words)


def require(module: str, purpose: str, extra: Extra) -> None:
    """Raise `ValueError` with the command that installs a package, if it is not installed.

    purpose: what needs it, at the beginning of the message.
    """
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{purpose} needs the package {module}: {install_command(extra)}")


def install_system_package(name: str) -> str:
    """A command line that installs a package of the Linux distribution, or a sentence where none is known."""
    for manager in ("apt-get", "dnf", "yum", "zypper"):
        if shutil.which(manager):
            return f"{manager} install {name}"
    return f"install the package {name}"


def _origin() -> dict[str, Any]:
    """PEP 610's record of the source that pip installed from. `url` is empty if there is no record."""
    try:
        text = metadata.distribution(_NAME).read_text("direct_url.json")
        found = json.loads(text or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        found = {}
    return {"url": "", **found} if isinstance(found, dict) else {"url": ""}
