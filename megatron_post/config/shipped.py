"""The configs and launchers that are installed with the package, and copies of them to start from."""

import re
import shutil
from itertools import takewhile
from pathlib import Path

from megatron_post.storage.reading import did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
# Files refer to each other by their path from the directory in which commands are run.
_REFERENCE = re.compile(r"\bconfigs/[\w./-]*\w")


def shipped(path: str) -> Path:
    """The installed file or directory, such as `configs/tiny/demo.yaml`. In a checkout it is the checkout's.

    Raises `ValueError` if there is none of that name.
    """
    for root in (_PACKAGE, _PACKAGE.parent):  # setup.py puts both directories into the package
        if (root / path).exists():
            return root / path
    names = [str(Path("configs") / name) for name in _names()]
    raise ValueError(f"{path}: no such file was installed{did_you_mean(path, names)}")


def listed() -> dict[str, str]:
    """The purpose of each shipped config by its name, such as `llama3_8b/sft`.

    It is the first sentence of the file's first comment.
    """
    root = shipped("configs")
    return {name.removesuffix(".yaml"): _purpose((root / name).read_text()) for name in _names()}


def copy(name: str, target: Path) -> list[Path]:
    """Copy a directory of configs, such as `llama3_8b`, or one config with what it refers to.

    The copies lie under `target` as they do in the project, so that commands find them. A file that is there
    with the same content is left. Returns the files that were written. Raises `ValueError` for an unknown
    name, and before anything is written if a file is there with other content.
    """
    root = shipped("configs").parent
    wanted = {root / "launchers"} if name == "launchers" else {_found(root, name)}
    files: set[Path] = set()
    while wanted:
        path = wanted.pop()
        files |= {path}
        if path.is_dir():
            wanted |= {child for child in path.iterdir() if child.name != "__pycache__"} - files
        elif path.suffix == ".yaml":
            wanted |= _references(root, path) - files
    copies = {path: target / path.relative_to(root) for path in sorted(files) if path.is_file()}
    copies = {path: new for path, new in copies.items() if not _equal(path, new)}
    if changed := [new for new in copies.values() if new.exists()]:
        raise ValueError(
            f"{changed[0]} is there with other content; move it away, or copy to another directory"
        )
    for path, new in copies.items():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, new)
    return list(copies.values())


def _purpose(text: str) -> str:
    comments = takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in comments)
    return re.split(r"\.(?:\s|$)", comment)[0]


def _names() -> list[str]:
    root = shipped("configs")
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))


def _found(root: Path, name: str) -> Path:
    for path in (root / "configs" / name, root / "configs" / f"{name}.yaml"):
        inside = path.resolve().is_relative_to((root / "configs").resolve())
        if inside and path.exists() and name.strip("./"):
            return path
    names = [*listed(), *{item.partition("/")[0] for item in listed()}, "launchers"]
    raise ValueError(
        f"there is no shipped config {name!r}{did_you_mean(name, names)}; `megatron-post config list` "
        "prints all"
    )


def _references(root: Path, path: Path) -> set[Path]:
    """Shipped files that a config names, and its `base`."""
    text = path.read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    named = {root / match for line in lines for match in _REFERENCE.findall(line)}
    bases = {path.parent / line.partition(":")[2].strip() for line in lines if line.startswith("base:")}
    return {found for found in named | bases if found.exists()}


def _equal(path: Path, new: Path) -> bool:
    return new.is_file() and new.read_bytes() == path.read_bytes()
