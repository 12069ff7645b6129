"""Reads the input of a recipe, which is rows of a dataset, or files of a directory or their pieces."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_post.config.data import Source
from megatron_post.config.section import Count, Name, Section
from megatron_post.data.dialog import BadRow
from megatron_post.data.rows import BadRows, raw_rows
from megatron_post.storage.reading import did_you_mean_path
from megatron_post.synthesis.row import row_id

_LARGEST_FILE = 64 * 2**20  # bytes of a file that is cut into pieces


class _Taken(Section):
    share: float = Field(
        1.0, gt=0, le=1, description="part of the rows that is used. The id of a row decides whether it is"
    )
    max_rows: Count | None = Field(None, description="use only the first rows, as many as this; null: all")


class RowsInput(_Taken):
    """Rows of a dataset: JSON lines, CSV, Parquet, Arrow, or a name on the hub."""

    kind: Literal["rows"] = Field(description="selects this kind of input")
    path: Name = Field(description="file, directory, or name of a dataset on the hub")
    split: Name = Field("train", description="split of a dataset that has several")
    subset: Name | None = Field(None, description="configuration of a dataset that has several")


class DocumentsInput(_Taken):
    """Pieces of text files, such as snippets of code. A row has `text`, `file`, `first_line`, `last_line`."""

    kind: Literal["documents"] = Field(description="selects this kind of input")
    path: Name = Field(description="file, or directory. Names in it that begin with a dot are skipped")
    pattern: Name = Field("**/*", description="which files of the directory are read, such as **/*.py")
    unit: Literal["lines", "characters"] = Field("lines", description="what `size` and `least` count")
    size: Count | None = Field(None, description="largest size of a piece; null: a file is one piece")
    least: Count = Field(1, description="pieces shorter than this are skipped")


class RepositoriesInput(_Taken):
    """Whole repositories. A row has the name `repository`, `files` (path -> text) and `left_out` (paths)."""

    kind: Literal["repositories"] = Field(description="selects this kind of input")
    path: Name = Field(description="directory, in which each directory is a repository")
    pattern: Name = Field("**/*.py", description="which files of a repository are read")


class FilesInput(_Taken):
    """Whole files of any kind, such as spreadsheets. A row has the name `file` and `base64`, the content."""

    kind: Literal["files"] = Field(description="selects this kind of input")
    path: Name = Field(description="file, or directory. Names in it that begin with a dot are skipped")
    pattern: Name = Field("**/*", description="which files of the directory are read, such as **/*.csv")
    largest_kib: Count = Field(256, le=2**16, description="larger files are bad rows")


AnyInput = RowsInput | DocumentsInput | RepositoriesInput | FilesInput
InputSettings = Annotated[AnyInput, Field(discriminator="kind")]


@dataclass(frozen=True)
class InputRow:
    """One input row.

    source: the place of the row, as "file:line" or "file:first-last".
    """

    id: str
    values: dict[str, Any]
    source: str


def read_input(settings: AnyInput, *, bad_rows: BadRows, key: str = "input") -> Iterator[InputRow]:
    """Yield the good rows in order. Raises `ValueError` (`TooManyBadRows`) for an input that cannot be read.

    Bad rows are added to `bad_rows`. key: of the settings, for messages.
    """
    if isinstance(settings, RowsInput):
        records = _from_rows(settings)
    elif isinstance(settings, DocumentsInput):
        records = _from_documents(settings, key)
    elif isinstance(settings, FilesInput):
        records = _from_files(settings, key)
    else:
        records = _from_repositories(settings, key)
    return islice(_good(records, settings, bad_rows), settings.max_rows)


def _good(records: Iterator[tuple[str, Any]], settings: AnyInput, bad_rows: BadRows) -> Iterator[InputRow]:
    for source, values in records:
        try:
            if isinstance(values, BadRow):
                raise values
            if not isinstance(values, dict):
                raise BadRow(f"a row must be a mapping, not {type(values).__name__}")
            row = InputRow(row_id(values), values, source)
        except BadRow as error:
            bad_rows.add(Path(settings.path).name, source, str(error))
            continue
        if int(row.id[:13], 16) < settings.share * 16**13:
            yield row


def _from_rows(settings: RowsInput) -> Iterator[tuple[str, Any]]:
    source = Source(name="input", path=settings.path, split=settings.split, subset=settings.subset)
    for _, where, values in raw_rows(source):
        yield where, values


def _from_documents(settings: DocumentsInput, key: str) -> Iterator[tuple[str, Any]]:
    path = Path(settings.path)
    for file in _files(path, settings.pattern, key):
        try:
            _check_place(file, path)
            text = _text(file)
        except BadRow as error:
            yield _where(file), error
            continue
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        for first, last, piece in _pieces(text, settings):
            size = last - first + 1 if settings.unit == "lines" else len(piece)
            if size >= settings.least and piece.strip():
                values = {"text": piece, "file": name, "first_line": first, "last_line": last}
                yield f"{file}:{first}-{last}", values


def _from_files(settings: FilesInput, key: str) -> Iterator[tuple[str, Any]]:
    path, most = Path(settings.path), settings.largest_kib * 2**10
    for file in _files(path, settings.pattern, key):
        try:
            _check_place(file, path)
            content = _bytes(file, most)
        except BadRow as error:
            yield _where(file), error
            continue
        yield str(file), {"file": file.name, "base64": base64.b64encode(content).decode()}


def _where(file: Path) -> str:
    """The path of a file, with question marks in place of bytes that are not UTF-8."""
    return str(file).encode(errors="replace").decode()


def _check_place(file: Path, directory: Path) -> None:
    """Raises `BadRow` for a link that leads out of the directory, and for a name that rows cannot have."""
    if _where(file) != str(file):
        raise BadRow("its name is not text in UTF-8")
    if directory.is_dir() and not file.resolve().is_relative_to(directory.resolve()):
        raise BadRow(f"a link that leads out of {directory}, as in code of others: copy the file to use it")


def _from_repositories(settings: RepositoriesInput, key: str) -> Iterator[tuple[str, Any]]:
    """Directories without a file of the pattern are passed over. Raises `ValueError` if all are."""
    path = Path(settings.path)
    if not path.is_dir():
        raise ValueError(f"{key}.path: {path} is not a directory{did_you_mean_path(path)}")
    found = False
    for repository in sorted(path.iterdir()):
        is_one = repository.is_dir() and not repository.name.startswith(".")
        if is_one and (names := list(_matching(repository, settings.pattern, key))):
            found = True
            yield str(repository), _repository(repository, names)
    if not found:
        raise ValueError(f"{key}.pattern={settings.pattern}: no directory of {path} has such a file")


def _repository(path: Path, names: list[Path]) -> dict[str, Any] | BadRow:
    """A row, or why there is none. Files that are no text are listed, and cost no repository."""
    files: dict[str, str] = {}
    left_out: list[str] = []
    for file in names:
        name = file.relative_to(path).as_posix()
        try:
            files[name] = _text(file)
        except BadRow:
            left_out.append(name)
        if sum(map(len, files.values())) > _LARGEST_FILE:
            return BadRow(f"huge: its files have more than {_LARGEST_FILE:,} characters")
    return {"repository": path.name, "files": files, "left_out": left_out}


def _matching(path: Path, pattern: str, key: str) -> Iterator[Path]:
    """Regular files of a directory in the order of their names. Raises `ValueError` for a wrong pattern."""
    try:
        names = sorted(path.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{key}.pattern={pattern}: {error}") from None
    for file in names:
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def _files(path: Path, pattern: str, key: str) -> Iterator[Path]:
    """Yield the regular files, sorted by name. Raises `ValueError` if there are none."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise ValueError(f"{key}.path: {path} does not exist{did_you_mean_path(path)}")
    found = False
    for file in _matching(path, pattern, key):
        found = True
        yield file
    if not found:
        raise ValueError(f"{key}.pattern={pattern}: {path} has no such file")


def _text(file: Path) -> str:
    """The text of a file. Raises `BadRow` if it is not text."""
    try:
        text = _bytes(file, _LARGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"not text in UTF-8: byte {error.start}") from None
    if "\0" in text:
        raise BadRow("not a text: it holds a null character")
    return text.replace("\r\n", "\n")


def _bytes(file: Path, most: int) -> bytes:
    """The content of a file. Raises `BadRow` if it cannot be read, or has more than `most` bytes."""
    try:
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise BadRow(f"cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise BadRow(f"huge: more than {most:,} bytes")
    return content


def _pieces(text: str, settings: DocumentsInput) -> Iterator[tuple[int, int, str]]:
    """Yield the first line, the last line and the text of each piece. Line numbers start at 1."""
    lines, size, first, last = settings.unit == "lines", 0, 1, 1
    piece: list[str] = []
    for number, line in enumerate(io.StringIO(text), start=1):
        for part in [line] if lines or settings.size is None else _parts(line, settings.size):
            more = 1 if lines else len(part)
            if piece and settings.size is not None and size + more > settings.size:
                yield first, last, "".join(piece)
                piece, size = [], 0
            if not piece:
                first = number
            piece.append(part)
            size, last = size + more, number
    if piece:
        yield first, last, "".join(piece)


def _parts(line: str, size: int) -> Iterator[str]:
    """Yield a line in parts of at most `size` characters. A part ends with a blank if possible."""
    while len(line) > size:
        cut = line.rfind(" ", 0, size) + 1 or size
        yield line[:cut]
        line = line[cut:]
    yield line
