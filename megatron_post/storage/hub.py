"""Models that are named as on the Hugging Face Hub, such as `meta-llama/Llama-3.1-8B`."""

import re
from collections.abc import Sequence
from pathlib import Path

_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_CONFIG = ("config.json",)
# Meta's original weights are in `original/`, and pickles are never read.
_MODEL = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY*", "README.md")


def model_directory(name: str | Path, *, whole: bool = True) -> Path:
    """The directory of a model: `name` itself, or the snapshot of the hub's model of that name.

    name: a path, or `organization/model`, or `organization/model@revision`. A name of the hub is looked up
    only if there is no such path and its first part is no directory here. Missing files are downloaded into
    the hub's cache (`HF_HOME`), with the token of `HF_TOKEN` or of `hf auth login`. With `HF_HUB_OFFLINE=1`
    only the cache is read. whole: with weights and tokenizer, and not `config.json` alone.

    Raises `ValueError` with the hub's reason if the model cannot be had. Returns `name` as a path if it is
    not a name of the hub, also if nothing is there.
    """
    path = Path(name)
    match = _ID.fullmatch(str(name))
    if match is None or path.exists() or Path(path.parts[0]).is_dir():
        return path
    return _snapshot(match["repo"], match["revision"], _MODEL if whole else _CONFIG)


def hub_name(directory: Path) -> str | None:
    """`organization/model@commit` of a snapshot in the hub's cache, or None for any other directory."""
    directory = directory.absolute()
    owner, separator, model = directory.parent.parent.name.removeprefix("models--").partition("--")
    if directory.parent.name != "snapshots" or not separator:
        return None
    return f"{owner}/{model}@{directory.name}"


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    named = repo if revision is None else f"{repo}@{revision}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ValueError(
            f"{named}: the model's owner must give you access on its page; then set HF_TOKEN to your token"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{named} is neither a directory here nor in the hub's cache, and the hub cannot be reached. "
            f"Where there is internet, run `hf download {repo}`, and set HF_HOME to the same directory here"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{named} is no directory here, and the hub says: {reason}") from error
