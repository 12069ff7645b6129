"""Licences of base models: the files that exports carry on, and what Llama's licences ask of them."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_post.convert.contained import contained_file

_FILES = re.compile(r"(LICENSE|LICENCE|USE_POLICY|NOTICE)([.-][\w.-]*)?", re.ASCII | re.IGNORECASE)
_LARGEST = 1_000_000  # bytes; a file of this name that is larger is no licence
_TITLE = re.compile(rb"LLAMA\s+(\d+(?:\.\d+)?)\s+(?:VERSION\s+|COMMUNITY\s+LICENSE)", re.IGNORECASE)
_NAME = re.compile(r"meta-llama/(?:Meta-)?Llama-(\d+(?:\.\d+)?)-.*")
_ID = re.compile(r"[\w][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class LlamaLicence:
    """What the Llama 3, 3.1, 3.2 and 3.3 Community License asks of who publishes a derived model.

    begins: how the published model's name must begin.
    """

    version: str

    @property
    def begins(self) -> str:
        return "Llama 3" if self.version == "3" else "Llama"

    @property
    def display(self) -> str:
        """What must be displayed. The licence of Llama 3 has other words than its successors."""
        return "Built with Meta Llama 3" if self.version == "3" else "Built with Llama"

    @property
    def notice(self) -> bytes:
        """The text of the file NOTICE, which every copy must have."""
        name = f"{'Meta ' * (self.version == '3')}Llama {self.version}"
        return (
            f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. "
            "All Rights Reserved.\n"
        ).encode()


def llama_licence(identifier: str | None) -> LlamaLicence | None:
    """The Llama licence of a hub's identifier such as `llama3.1`, or None for another licence."""
    match = re.fullmatch(r"llama(3(?:\.\d)?)", identifier or "")
    return None if match is None else LlamaLicence(match[1])


def legal_files(directory: Path) -> dict[str, bytes]:
    """LICENSE, USE_POLICY and NOTICE of a directory by name, with any ending.

    Raises `ValueError` for a link that leads out of the directory, and for a file that is too large.
    """
    if not directory.is_dir():
        return {}
    found = {}
    for name in sorted(path.name for path in directory.iterdir()):
        if not _FILES.fullmatch(name) or (directory / name).is_dir():
            continue
        path = contained_file(directory, name, named_by=directory)
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which is no licence; remove it")
        found[name] = path.read_bytes()
    return found


def licence_of(directory: Path, name: str) -> str | None:
    """The hub's identifier of a base model's licence, or None if nothing says which it is.

    The LICENSE decides, then the directory's model card, then the name of one of Meta's models.
    """
    files = legal_files(directory)
    titles = [match for content in files.values() if (match := _TITLE.search(content))]
    if titles:
        return f"llama{titles[0][1].decode()}"
    stated = _stated(directory / "README.md")
    if stated is not None:
        return stated
    known = _NAME.fullmatch(name)
    return None if known is None else f"llama{known[1]}"


def _stated(card: Path) -> str | None:
    """The licence in the metadata of a model card. A card that cannot be read states none."""
    from huggingface_hub.repocard import metadata_load

    found = None
    if card.is_file() and card.stat().st_size <= _LARGEST:
        with contextlib.suppress(Exception):  # YAML from outside fails in many ways
            found = (metadata_load(card) or {}).get("license")
    return found if isinstance(found, str) and _ID.fullmatch(found) else None
