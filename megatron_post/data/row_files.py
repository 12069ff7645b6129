"""Finds the files of a split in a directory, by the README of a hub clone or by the names of files.

`datasets` is imported where a directory is read. It takes a second, and neither training nor rows
of JSON Lines need it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_post.config.data import Source

if TYPE_CHECKING:
    from datasets.utils.metadata import MetadataConfigs

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
CSV_SUFFIXES = (".csv", ".csv.gz")
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, ".parquet", ".arrow")
# Files with these endings hold data too. If they were skipped, a part of the split would be missing silently.
_UNREADABLE = (".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".tar.gz", ".tsv", ".orc", ".feather")
# Keys of a configuration in a README that are used here, or that do not concern the rows.
_CONFIG_KEYS = {"data_files", "data_dir", "default", "description", "version", "features", "drop_labels"}

_SAMPLE = 2**20  # bytes whose lines estimate the number of rows of a file


def files_of(directory: Path, source: Source) -> list[Path]:
    """The sorted files of `source.split` in the configuration `source.subset`, or in the default one.

    A subset may also be a directory. Raises `ValueError` for a missing split, configuration or file, and for
    files that cannot be read.
    """
    from datasets.data_files import DataFilesList

    configs = _configs(directory)
    if configs:
        directory, patterns = _of_config(directory, configs, source)
    else:
        if source.subset:
            directory = _subdirectory(directory, source)
        patterns = _patterns(directory)
    found = patterns.get(source.split, [])
    if any("://" in pattern for pattern in found):
        raise ValueError(f"source {source.name!r}: {directory} names files elsewhere: {found}; download them")
    try:
        files = [Path(file) for file in DataFilesList.from_patterns(found, str(directory))] if found else []
    except FileNotFoundError as error:
        raise ValueError(f"source {source.name!r}: {directory}: {error}") from None
    if unreadable := [file for file in files if file.name.endswith(_UNREADABLE)]:
        raise ValueError(
            f"source {source.name!r}: {unreadable[0]} is of split {source.split!r} and cannot be read; "
            f"unpack it, or convert it to one of {', '.join(SUFFIXES)}"
        )
    readable = sorted(file for file in files if file.name.endswith(SUFFIXES))
    if not readable:
        raise ValueError(
            f"source {source.name!r}: {directory} holds no files of split {source.split!r} ending in "
            f"{', '.join(SUFFIXES)}; splits found: {', '.join(map(str, patterns)) or 'none'}"
        )
    return readable


def likely_rows(source: Source) -> int | None:
    """About how many rows a source has, from its first lines. None for a source that is no plain JSON lines.

    Counting all lines would read a large file twice.
    """
    path = Path(source.path)
    if not path.name.endswith(".jsonl") or not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.read(_SAMPLE)
    size, lines = path.stat().st_size, first.count(b"\n") or 1
    rows = lines if len(first) == size else round(lines * size / (first.rfind(b"\n") + 1 or len(first)))
    return rows if source.max_rows is None else min(rows, source.max_rows)


def _configs(directory: Path) -> "MetadataConfigs":
    """The configurations that a README names, empty if there are none."""
    from datasets.load import DatasetCard
    from datasets.utils.metadata import MetadataConfigs

    readme = directory / "README.md"
    if not readme.is_file():
        return MetadataConfigs()
    try:
        return MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)
    except Exception as error:  # the card may fail with many types of error, and the message names the file
        raise ValueError(f"{readme}: its dataset configurations cannot be read: {error}") from error


def _of_config(directory: Path, configs: "MetadataConfigs", source: Source) -> tuple[Path, dict[str, Any]]:
    """The directory of a configuration's files, and the patterns of files by split."""
    from datasets.data_files import sanitize_patterns

    try:
        name = source.subset or configs.get_default_config_name()
    except ValueError as error:
        raise ValueError(f"{directory / 'README.md'}: {error}") from None
    if name not in configs:
        wanted = "names no default configuration" if name is None else f"has no configuration {name!r}"
        raise ValueError(
            f"source {source.name!r}: {directory / 'README.md'} {wanted}; give subset, one of "
            f"{', '.join(configs)}"
        )
    config = configs[name]
    if unknown := sorted(config.keys() - _CONFIG_KEYS):
        raise ValueError(
            f"{directory / 'README.md'}: configuration {name!r} sets {', '.join(unknown)}, which is "
            "not supported; name the files by path instead"
        )
    directory = directory / (config.get("data_dir") or "")
    files = config.get("data_files")
    return directory, _patterns(directory) if files is None else sanitize_patterns(files)


def _subdirectory(directory: Path, source: Source) -> Path:
    inner = directory / str(source.subset)
    if not inner.is_dir() or not inner.resolve().is_relative_to(directory.resolve()):
        names = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")
        raise ValueError(
            f"source {source.name!r}: subset={source.subset} must be a configuration on the hub or in a "
            f"README.md, or a directory, and {directory} has none of that name; directories: "
            f"{', '.join(names) or 'none'}"
        )
    return inner


def _patterns(directory: Path) -> dict[str, Any]:
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    try:
        return {str(split): patterns for split, patterns in get_data_patterns(str(directory)).items()}
    except EmptyDatasetError:
        return {}
