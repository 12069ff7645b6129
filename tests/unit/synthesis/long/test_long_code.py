"""Repositories without a file that others import: which answers are kept, and which files import it."""

import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_post.storage.reading import read_object
from tests.scripted_server import Body, ScriptedServer
from tests.unit.synthesis.code.running import needs_bubblewrap
from tests.unit.synthesis.conftest import Place
from tests.unit.synthesis.long.packed import LONGEST, pack
from tests.unit.synthesis.long.repositories import answer, fault, write_repository, write_tests

pytestmark = needs_bubblewrap
LIST_ONLY, BOTH = "importers", "importers, code"
NO_ANSWER = "no answer on the repository passes the checks"
EXPECTED = {
    "good": BOTH,
    "second_list": BOTH,
    "second_code": BOTH,
    "no_code": LIST_ONLY,
    "broken_code": LIST_ONLY,
    "deep": LIST_ONLY,
    "lacking": LIST_ONLY,
    "stub": LIST_ONLY,
    "prose": NO_ANSWER,
    "more": NO_ANSWER,
    "fewer": NO_ANSWER,
    "cut": NO_ANSWER,
    "refused": "refused by a model",
    "four": "no module is imported by enough files",
    "huge": "the files that import the module do not fit the largest bucket",
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ScriptedServer(answer, fault) as server:
        yield Place(tmp_path, server)


def _run(place: Place, tokenizer: Path, *, size: int = 1, seconds: float = 5.0, **settings: Any) -> None:
    backend = {"kind": "server", "url": place.server.url, "served_model": "author", "timeout": 20.0}
    for rank in reversed(range(size)):
        place.run(
            rank=rank,
            size=size,
            recipe="long_code",
            settings={"tokenizer": str(tokenizer), **settings},
            input={"kind": "repositories", "path": str(place.directory / "repositories")},
            models={"author": {"model": "author", "backend": backend}},
            sandbox={"kind": "bubblewrap", "limits": {"seconds": 60.0, "cpu_seconds": seconds}},
            max_failed=0.1,
        )


def _write(place: Place, *manners: str) -> None:
    for manner in manners:
        directory = place.directory / "repositories"
        write_repository(directory, manner, importers=4 if manner == "four" else 5)
        if manner == "huge":
            file = directory / manner / "src/shapes/user_0.py"
            file.write_text(file.read_text() + "x = 1\n" * 4000)


def _outcomes(place: Place) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in place.rows():
        name = row["repository"]
        found[name] = f"{found[name]}, {row['kind']}" if name in found else row["kind"]
    return found | {Path(row["source"]).name: row["reason"] for row in place.rows("dropped.jsonl")}


def test_exactly_the_right_rows_come_out(place: Place, tokenizer_path: Path) -> None:
    _write(place, *EXPECTED)
    _run(place, tokenizer_path, tries=2, buckets=[4000, 8000])
    assert _outcomes(place) == EXPECTED
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    parsed = len(EXPECTED)
    assert steps["parse"]["results"] == {
        "a file is no text": parsed,
        "a file does not parse": parsed,
        "passed": parsed,
    }
    assert steps["list"]["results"] == {
        "right": 8,
        "other files than those that import it": 5,
        "the list is missing": 2,
        "the list is cut off": 2,
    }
    assert steps["check"]["results"] == {
        "right": 3,
        "the file lacks names that others use": 3,
        "the file is missing": 2,
        "the file does not parse": 4,
        "the file is too far from the original": 2,
    }
    for row in place.rows():
        assert row["missing"] == "src/shapes/core.py" and row["tokens"] <= row["bucket"]
        assert row["importers"] == [f"src/shapes/user_{number}.py" for number in range(5)]
        assert "class Shape" not in row["messages"][0]["content"]
        if row["kind"] == "code":
            assert row["names"] == ["LIMIT", "Shape", "area"] and 0.3 <= row["similarity"] <= 1
            assert [message.get("train") for message in row["messages"]] == [None, False, None, True]


def test_the_tests_of_a_repository_decide_where_they_need_the_file(
    place: Place, tokenizer_path: Path
) -> None:
    manners = {"good": True, "rewritten": True, "wrong": None, "exits": None, "red": False, "apart": False}
    _write(place, *manners)
    for manner in manners:
        write_tests(place.directory / "repositories", manner)
    command = ["python3", "-m", "unittest", "test_core"]
    _run(place, tokenizer_path, tries=1, buckets=[8000], tests=command)
    code = {row["repository"]: row["tested"] for row in place.rows() if row["kind"] == "code"}
    assert code == {manner: tested for manner, tested in manners.items() if tested is not None}
    steps = read_object(place.output / "summary.json", "summary")["summary"]["steps"]
    assert steps["check"]["results"] == {"right": 4, "the file fails the repository's tests": 2}
    assert steps["own_tests"]["results"]["they do not pass with the file"] == 1
    assert steps["own_tests"]["results"]["they pass without the file"] == 1


def test_a_run_that_was_cut_off_goes_on(place: Place, tokenizer_path: Path) -> None:
    _write(place, "good", "second_list", "prose", "second_code", "four")
    _run(place, tokenizer_path, tries=2, buckets=[8000])
    expected, asked = place.bytes(), place.asked()
    (journal,) = (place.output / "journal").glob("journal-*.jsonl")
    content = journal.read_bytes()[: journal.stat().st_size // 2]
    shutil.rmtree(place.output)
    journal.parent.mkdir(parents=True)
    journal.write_bytes(content)
    _run(place, tokenizer_path, size=2, tries=2, buckets=[8000])
    kept = content.count(b'"kind":"reply"')
    assert place.bytes() == expected and place.asked() in (asked - kept, asked - kept + 1)


def _reads(body: Body) -> str:
    """An author who finds the importers of a module of `rich` by their lines, and knows its files."""
    prompt = body["messages"][0]["content"]
    found = re.search(r"The file `(\w+)\.py` is missing", prompt)
    assert found is not None
    if len(body["messages"]) > 1:
        return f"```python\n{_rich(found[1] + '.py')}\n```"
    line = re.compile(
        rf"^ *from (rich)?\.{found[1]} import|^ *from (rich|\.) import {found[1]}\b", re.MULTILINE
    )
    sections = re.split(r"^File `(.*?)`:$", prompt, flags=re.MULTILINE)
    paths = [path for path, text in zip(sections[1::2], sections[2::2], strict=True) if line.search(text)]
    return "```text\n" + "\n".join(paths) + "\n```"


def _rich(name: str) -> str:
    return (Path(sysconfig.get_paths()["purelib"]) / "rich" / name).read_text()


def test_a_real_package_fills_a_pack_of_128k(tmp_path: Path, any_tokenizer: Path) -> None:
    package = Path(sysconfig.get_paths()["purelib"]) / "rich"
    shutil.copytree(package, tmp_path / "repositories/rich")
    with ScriptedServer(_reads) as server:
        place = Place(tmp_path, server)
        _run(place, any_tokenizer, seconds=30.0, modules=2, buckets=[LONGEST])
    rows = place.rows()
    assert rows and {row["bucket"] for row in rows} == {LONGEST}, place.rows("dropped.jsonl")
    assert max(row["tokens"] for row in rows) > 0.9 * LONGEST
    packed = pack(tmp_path, place.output / "rows.jsonl", any_tokenizer)
    assert sorted(map(len, packed)) == sorted(row["tokens"] for row in rows)
