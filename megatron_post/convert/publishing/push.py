"""`megatron-post push` uploads an export to the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_post.convert.contained import contained_file
from megatron_post.convert.hf_directory import INDEX, SINGLE, HuggingFaceDirectory, read_index
from megatron_post.convert.peft_directory import ADAPTER_CONFIG, ADAPTER_MODEL, PeftDirectory
from megatron_post.convert.publishing.card import CARD
from megatron_post.convert.publishing.legal import legal_files, llama_licence
from megatron_post.convert.publishing.record import RECORD, read_record
from megatron_post.convert.source import COMPANIONS
from megatron_post.storage.reading import did_you_mean_path

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MISSING = "`megatron-post convert megatron-to-hf` writes it from a checkpoint of the run"


@dataclass(frozen=True)
class Export:
    """The files that `push` uploads.

    files: their names and sizes in bytes. notes: warnings for the person who publishes them.
    """

    directory: Path
    files: dict[str, int]
    notes: tuple[str, ...]


def check_export(directory: Path, repo: str) -> Export:
    """The files of an export that belong to its model. Other files in the directory are not uploaded.

    Raises `ValueError` for a name that the hub would refuse, and for a directory that is no complete export
    of this package: without a training record and a card, or with missing, truncated or linked files.
    """
    if not _REPO.fullmatch(repo):
        raise ValueError(f"{repo!r} is no name on the hub; write ORGANIZATION/NAME or USER/NAME")
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory{did_you_mean_path(directory)}")
    record = read_record(directory)
    if record is None or not (directory / CARD).is_file():
        missing = CARD if record is not None else RECORD
        raise ValueError(f"{directory} has no {missing}, so it cannot be published; {_MISSING}")
    notes = []
    if (directory / ADAPTER_CONFIG).is_file():
        base = PeftDirectory(directory).base
        weights = [ADAPTER_CONFIG, ADAPTER_MODEL]
        if base is None or not _REPO.fullmatch(base) or Path(base).exists():
            notes.append(f"{ADAPTER_CONFIG} names the base model {base!r}, which others do not have")
    else:
        HuggingFaceDirectory(directory)
        index = read_index(directory)
        weights = [SINGLE] if index is None else [INDEX, *index.values()]
    companions = [name for name in COMPANIONS if (directory / name).is_file()]
    legal = legal_files(directory)
    names = dict.fromkeys([CARD, RECORD, *legal, *companions, *sorted(set(weights))])
    licence = llama_licence(record.license)
    if licence is not None and not any(name.upper().startswith("LICEN") for name in legal):
        notes.append(f"its licence is {record.license}, which asks for a copy of the LICENSE; add the file")
    if licence is not None and not _begins(repo, licence.begins):
        notes.append(f"its licence asks for a name that begins with {licence.begins!r}")
    paths = {name: contained_file(directory, name, named_by=directory) for name in names}
    return Export(directory, {name: path.stat().st_size for name, path in paths.items()}, tuple(notes))


def push(export: Export, repo: str, *, private: bool, revision: str | None) -> str:
    """Upload an export in one commit, and return its address. An existing repository keeps its other files.

    private: whether a new repository is private. An existing one stays as it is. revision: branch, which is
    created if it is missing. Raises `ValueError` with the hub's reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo,
            folder_path=export.directory,
            allow_patterns=[_literal(name) for name in export.files],
            revision=revision,
            commit_message="Upload a model with Megatron-Post",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{repo}: the hub cannot be written to: {reason}; set HF_TOKEN to a token with write access, or "
            "run `hf auth login`"
        ) from error
    return str(commit.commit_url)


def _begins(repo: str, begins: str) -> bool:
    """Whether the name of a repository begins as a licence asks. Names on the hub have no blanks."""
    name = repo.partition("/")[2]
    return name.lower().replace("-", " ").replace("_", " ").startswith(begins.lower())


def _literal(name: str) -> str:
    """A pattern of fnmatch for exactly this name."""
    return re.sub(r"([*?[])", r"[\1]", name)
