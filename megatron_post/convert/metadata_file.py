"""Reads `.metadata`, the pickled index of torch.distributed.checkpoint, without running it."""

import contextlib
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import IO, Any

from megatron_post.storage.manifest import DamagedCheckpoint
from megatron_post.storage.reading import plain_file

# Only exact names are allowed. If whole modules were allowed, a pickle could reach "os.system" through any
# module that imports os.
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
    """torch's pickled `Metadata`, read through an allow-list of plain classes.

    Raises `DamagedCheckpoint` if it refers to any other class, or to a file outside its directory.
    """
    try:
        with plain_file(path, "file").open("rb") as file, collector_paused():
            metadata = _PlainUnpickler(file).load()
        names = {entry.relative_path for entry in metadata.storage_data.values()}
    except Exception as error:  # a malformed pickle can raise any exception
        raise DamagedCheckpoint(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
    outside = sorted(name for name in names if Path(name).name != name)
    if outside:
        raise DamagedCheckpoint(f"{path}: names the file {outside[0]!r}, which is outside the checkpoint")
    return metadata


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Let Python's garbage collector wait while millions of small objects are made.

    It would visit all of them again and again, which takes several times as long as making them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _PlainUnpickler(pickle.Unpickler):
    """Makes objects of the allowed classes only, and restores the classes afterwards.

    A pickle can set attributes of a class as it can of any object. Such a change would outlive the read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._before: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"refers to {module}.{name}, which this project's checkpoints never do"
            )
        found = super().find_class(module, name)
        # A new function each time keeps the pickle from setting attributes of the real one.
        if isinstance(found, FunctionType):
            return lambda *arguments: found(*arguments)
        self._before.setdefault((module, name), (found, dict(getattr(found, "__dict__", {}))))
        return found

    def load(self) -> Any:
        try:
            return super().load()
        finally:
            changed = [text for found, before in self._before.values() for text in _restore(found, before)]
            if changed:
                raise pickle.UnpicklingError(
                    f"changes {changed[0]}, which this project's checkpoints never do"
                )


def _restore(found: Any, before: dict[str, Any]) -> list[str]:
    """Restore the attributes of a class. Returns the names of those that had changed."""
    now = dict(getattr(found, "__dict__", {}))
    changed = [name for name in {**now, **before} if now.get(name) is not before.get(name)]
    for name in changed:
        if name in before:
            setattr(found, name, before[name])
        else:
            delattr(found, name)
    return [f"{found.__name__}.{name}" for name in changed]
