"""The command that installs an extra in the way in which this copy of the package was installed."""

import importlib.util
import json
import shlex
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

# the extras of setup.py; "" is the package without extras
Extra = Literal["", "cuda", "dali", "generate", "curate", "synthesize", "wandb", "mlflow", "bench", "dev"]
_NAME = "megatron-post"


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
