"""`.metadata`, torch.distributed.checkpoint's pickled list of what lies where, read without running it."""

import pickle
from pathlib import Path
from types import FunctionType
from typing import IO, Any

from megatron_post.storage.manifest import DamagedCheckpoint
from megatron_post.storage.reading import plain_file

# Exact names only: a pickle may ask for "os.system" inside any module that imports os.
_ALLOWED = {
    *(
        ("torch", name)
        for name in ("Size", "float64", "float32", "bfloat16", "float16", "uint8", "int32", "int64")
    ),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}


def read_metadata(path: Path) -> Any:
    """torch's pickled `Metadata`, read through an allow-list of plain classes, its file names checked.

    Raises `DamagedCheckpoint` where it names anything else, or a file outside its directory.
    """
    try:
        with plain_file(path, "file").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        names = {entry.relative_path for entry in metadata.storage_data.values()}
    except Exception as error:  # a pickle that is no pickle can make its reader stumble over anything
        raise DamagedCheckpoint(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
    outside = sorted(name for name in names if Path(name).name != name)
    if outside:
        raise DamagedCheckpoint(f"{path}: names the file {outside[0]!r}, which is outside the checkpoint")
    return metadata


class _PlainUnpickler(pickle.Unpickler):
    """Makes objects of the allowed classes alone, and leaves the classes as they were: a pickle can set their
    attributes, as those of any object."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._before: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no checkpoint of ours does")
        found = super().find_class(module, name)
        if isinstance(found, FunctionType):
            return lambda *arguments: found(*arguments)
        self._before.setdefault((module, name), (found, dict(getattr(found, "__dict__", {}))))
        return found

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            changed = [text for found, before in self._before.values() for text in _put_back(found, before)]
            if changed:
                raise pickle.UnpicklingError(f"changes {changed[0]}, which no checkpoint of ours does")


def _put_back(found: Any, before: dict[str, Any]) -> list[str]:
    """Returns the attributes that had to be put back."""
    now = dict(getattr(found, "__dict__", {}))
    changed = [name for name in {**now, **before} if now.get(name) is not before.get(name)]
    for name in changed:
        if name in before:
            setattr(found, name, before[name])
        else:
            delattr(found, name)
    return [f"{found.__name__}.{name}" for name in changed]
