"""torch's pickled metadata may refer to plain classes and to files of the checkpoint, and changes nothing."""

import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex
from torch.serialization import _get_layout

from megatron_post.convert.metadata_file import read_metadata
from megatron_post.storage.manifest import DamagedCheckpoint


def test_paths_outside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    with path.open("wb") as file:
        pickle.dump(Metadata({}, storage_data={"x": _StorageInfo("../../etc/passwd", 0, 1)}), file)
    with pytest.raises(DamagedCheckpoint, match="outside"):
        read_metadata(path)


_METADATA = b"ctorch.distributed.checkpoint.metadata\n"


@pytest.mark.parametrize(
    "stream",
    [
        _METADATA + b"Metadata\n(N(dVx\nI1\nstb.",  # setattr(Metadata, "x", 1)
        (_METADATA + b"Metadata\n(N(dVx\nI1\nstb") * 2 + b".",
        _METADATA + b"MetadataIndex\n(N(dV__hash__\nctorch\nSize\nstb.",
        _METADATA + b"_MEM_FORMAT_ENCODING\n(N(dVx\nI1\nstb.",
        _METADATA + b"Metadata\n(N(dVx\nI1\nstbnonsense",
        b"ctorch.serialization\n_get_layout\n(N(dV__defaults__\n(I1\ntstb.",
    ],
)
def test_metadata_changes_no_class(tmp_path: Path, stream: bytes) -> None:
    """A pickle can set attributes of any class that it names, for the rest of the process."""
    named = (Metadata, MetadataIndex, _MEM_FORMAT_ENCODING)
    before = [dict(vars(found)) for found in named]
    (tmp_path / ".metadata").write_bytes(stream)
    with pytest.raises(DamagedCheckpoint):
        read_metadata(tmp_path / ".metadata")
    assert [dict(vars(found)) for found in named] == before and _get_layout.__defaults__ is None
