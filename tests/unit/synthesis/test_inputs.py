"""Input rows have an id and a place, in an order that is always the same."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_post.data.rows import BadRows, TooManyBadRows
from megatron_post.synthesis.inputs import (
    DocumentsInput,
    FilesInput,
    RepositoriesInput,
    RowsInput,
    read_input,
)


def _documents(path: Path, **values: Any) -> list[tuple[str, str]]:
    """Place, from its file on, and text of each piece."""
    settings = DocumentsInput(kind="documents", path=str(path), **values)
    rows = list(read_input(settings, bad_rows=BadRows()))
    return [(row.source.rpartition("/")[2], row.values["text"]) for row in rows]


def test_rows_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n{"a": 1, "id": "x", "provenance": {}}\nnonsense\n{"a": 3}\n')
    bad_rows = BadRows(2)
    rows = list(read_input(RowsInput(kind="rows", path=str(path)), bad_rows=bad_rows))
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 4, 6)]
    assert rows[0].id == rows[1].id != rows[2].id  # an id and a provenance are no content
    assert [example.partition(": ")[0] for example in bad_rows.examples] == [f"{path}:3", f"{path}:5"]
    with pytest.raises(TooManyBadRows):
        list(read_input(RowsInput(kind="rows", path=str(path)), bad_rows=BadRows(1)))
    assert len(list(read_input(RowsInput(kind="rows", path=str(path), max_rows=2), bad_rows=BadRows(1)))) == 2


def test_a_share_of_the_rows_is_the_same_each_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(1000)))

    def taken(share: float) -> set[int]:
        settings = RowsInput(kind="rows", path=str(path), share=share)
        return {row.values["n"] for row in read_input(settings, bad_rows=BadRows())}

    assert 60 < len(taken(0.1)) < 140  # 1000 draws of 0.1 have a deviation of 9.5
    assert taken(0.1) == taken(0.1) < taken(0.5) < taken(1.0) and len(taken(1.0)) == 1000


def test_pieces_of_lines(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.py").write_bytes(b"1\r\n2\r\n3\r\n4\r\n5")
    (tmp_path / "a.py").write_text("x\x0cy\n\n \n")  # a form feed ends no line
    (tmp_path / "c.txt").write_text("not this one")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/hidden.py").write_text("hidden")
    found = _documents(tmp_path, pattern="**/*.py", size=2)
    assert found == [
        ("a.py:1-2", "x\x0cy\n\n"),
        ("two.py:1-2", "1\n2\n"),
        ("two.py:3-4", "3\n4\n"),
        ("two.py:5-5", "5"),
    ]
    assert _documents(tmp_path, pattern="**/*.py", size=2, least=2) == found[:3]
    assert _documents(tmp_path / "c.txt") == [("c.txt:1-1", "not this one")]


def test_pieces_of_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\nthree\n\nfour five six seven\n" + "x" * 25 + "\n")
    found = _documents(tmp_path, unit="characters", size=10)
    assert "".join(text for _, text in found) == (tmp_path / "a.txt").read_text()
    assert all(len(text) <= 10 for _, text in found)
    assert [place for place, _ in found] == [
        *("a.txt:1-1", "a.txt:2-3", "a.txt:4-4", "a.txt:4-4"),
        *("a.txt:5-5", "a.txt:5-5", "a.txt:5-5"),
    ]


def test_what_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    (tmp_path / "b").write_bytes(b"\x7fELF\0")
    (tmp_path / "c").write_text("good")
    bad_rows = BadRows(2)
    settings = DocumentsInput(kind="documents", path=str(tmp_path))
    assert [row.values["file"] for row in read_input(settings, bad_rows=bad_rows)] == ["c"]
    assert "not text in UTF-8" in bad_rows.examples[0] and "null character" in bad_rows.examples[1]


@pytest.mark.parametrize("settings", [DocumentsInput, FilesInput])
def test_a_name_that_is_not_text_is_a_bad_row(
    tmp_path: Path, settings: type[DocumentsInput | FilesInput]
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("bad")
    bad_rows, kind = BadRows(1), "documents" if settings is DocumentsInput else "files"
    rows = read_input(settings(kind=kind, path=str(tmp_path)), bad_rows=bad_rows)  # type: ignore[arg-type]
    assert [row.values["file"] for row in rows] == ["good.txt"]
    assert bad_rows.examples == [f"{tmp_path}/bad?.txt: its name is not text in UTF-8"]


def test_a_link_in_the_code_of_others_leads_to_no_file_of_this_machine(tmp_path: Path) -> None:
    code, key = tmp_path / "code", tmp_path / "key"
    code.mkdir()
    key.write_text("a secret")
    (code / "a").write_text("good")
    (code / "b").symlink_to(key)
    (code / "c").symlink_to("a")
    (tmp_path / "link").symlink_to(code)
    for path in (code, tmp_path / "link"):
        bad_rows = BadRows(1)
        rows = read_input(DocumentsInput(kind="documents", path=str(path)), bad_rows=bad_rows)
        assert [row.values["file"] for row in rows] == ["a", "c"]
        assert "a link that leads out of" in bad_rows.examples[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "missing"}, "does not exist"),
        ({"pattern": "*.rs"}, "has no such file"),
        ({"pattern": "/etc/*"}, "input.pattern"),
    ],
)
def test_inputs_that_are_not_there(tmp_path: Path, values: dict[str, str], message: str) -> None:
    (tmp_path / "a.py").write_text("x")
    path = tmp_path / values.pop("path", "")
    with pytest.raises(ValueError, match=message):
        _documents(path, **values)


def test_whole_repositories(tmp_path: Path) -> None:
    for name in (
        "b/src/one.py",
        "b/.git/hidden.py",
        "a/two.py",
        "a/latin.py",
        "docs/page.md",
        ".venv/three.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/latin.py").write_bytes(b"# \xe9")
    (tmp_path / "file.py").write_text("no repository")
    settings = RepositoriesInput(kind="repositories", path=str(tmp_path))
    rows = list(read_input(settings, bad_rows=BadRows()))
    assert [row.values for row in rows] == [
        {"repository": "a", "files": {"two.py": "a/two.py"}, "left_out": ["latin.py"]},
        {"repository": "b", "files": {"src/one.py": "b/src/one.py"}, "left_out": []},
    ]
    for values in ({"path": f"{tmp_path}/absent"}, {"path": str(tmp_path), "pattern": "*.rs"}):
        with pytest.raises(ValueError, match=r"input\."):
            list(read_input(RepositoriesInput(kind="repositories", **values), bad_rows=BadRows()))
