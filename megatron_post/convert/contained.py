"""Files of a model directory. A name in the directory may only lead to a file in the directory."""

from pathlib import Path

from megatron_post.convert.source import COMPANIONS


def contained_file(directory: Path, name: str, *, named_by: Path) -> Path:
    """The path of the file `name` of a directory.

    Raises `ValueError` for a name or a symbolic link that leads out of the directory, with `named_by` as the
    place that the name comes from. A snapshot of the Hugging Face cache may link into the `blobs` of its own
    repository, because that cache stores every file there.
    """
    path = directory / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{named_by}: file name {name!r} points outside the directory")
    root = directory.resolve()
    homes = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{path}: {error}") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"{named_by}: {name!r} is a link that points outside the directory")
    if not path.is_file():
        raise ValueError(f"{path}: missing, or not a regular file")
    return path


def companion_files(directory: Path) -> dict[str, bytes]:
    """Config and tokenizer files of a directory, by name.

    Raises `ValueError` for a link that leads out of the directory.
    """
    present = [name for name in COMPANIONS if (directory / name).is_file()]
    return {name: contained_file(directory, name, named_by=directory).read_bytes() for name in present}
