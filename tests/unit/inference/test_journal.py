"""A journal keeps all appended entries after any kill, and distinguishes damage from an incomplete line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_post.inference.journal import Journal, key_of
from megatron_post.storage.files import DiskFull

A, B, C = (key_of(asked=name) for name in "abc")


def test_entries_are_there_after_a_restart(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        assert journal.get(A) is None and A not in journal
        journal.append(A, "reply", {"text": "ä \ud800 \n"})
        journal.append(B, "refusal", {"refusal": "no"})
        assert journal.get(A) == {"text": "ä \ud800 \n"} and A in journal and len(journal) == 2
    lines = (tmp_path / "journal-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["reply", "refusal"]
    with Journal(tmp_path) as journal:
        assert journal.get(B) == {"refusal": "no"} and C not in journal
        journal.append(C, "outcome", {"stdout": "x" * 100_000})
        assert journal.get(C) == {"stdout": "x" * 100_000} and journal.get(A) == {"text": "ä \ud800 \n"}


def test_keys_are_of_content() -> None:
    """The order of an object's keys and the way it was made do not matter, but every value does."""
    one = key_of(scope=["math", 1], seed=0, messages=[{"role": "user", "content": "ä"}])
    assert one == key_of(messages=[{"content": "ä", "role": "user"}], seed=0, scope=("math", 1))
    others = [
        key_of(scope=["math", 2], seed=0, messages=[{"role": "user", "content": "ä"}]),
        key_of(scope=["math", 1], seed=1, messages=[{"role": "user", "content": "ä"}]),
        key_of(scope=["math", 1], seed="0", messages=[{"role": "user", "content": "ä"}]),
    ]
    assert len({one, *others}) == 4 and len(one) == 32


def _written(directory: Path) -> bytes:
    with Journal(directory) as journal:
        journal.append(A, "reply", {"text": "first"})
        journal.append(B, "reply", {"text": "second"})
    return (directory / "journal-00000.jsonl").read_bytes()


def test_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    """For a kill at any byte of the second line, the first stays and the second can be written again."""
    whole = _written(tmp_path)
    path = tmp_path / "journal-00000.jsonl"
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        with Journal(tmp_path) as journal:
            assert A in journal and B not in journal
            journal.append(B, "reply", {"text": "second"})
        assert path.read_bytes() == whole


def test_damage_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    """A flipped bit of any line gives an error or an incomplete last line, but never other values."""
    whole = _written(tmp_path)
    path = tmp_path / "journal-00000.jsonl"
    errors = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            with Journal(tmp_path) as journal:
                found = [journal.get(key) for key in (A, B)]
        except ValueError as error:
            assert "journal-00000.jsonl:" in str(error) and "Remove the line" in str(error)
            errors += 1
        else:  # the last newline is damaged, so the line is incomplete
            assert found == [{"text": "first"}, None] and at == len(whole) - 1
    assert errors == len(whole) - 1
    path.write_bytes(whole[: whole.index(b"\n") + 1] + b"{}\n")
    with pytest.raises(ValueError, match=r"journal-00000.jsonl:2: this line of the journal is damaged"):
        Journal(tmp_path)


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    with (
        Journal(tmp_path),
        pytest.raises(ValueError, match=r"journal-00000.jsonl is being written by process"),
    ):
        Journal(tmp_path)
    with Journal(tmp_path), Journal(tmp_path, writer=1):
        pass
    code = f"from megatron_post.inference.journal import Journal; Journal({str(tmp_path)!r})"
    with Journal(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "is being written by process" in done.stderr


def test_other_writers_entries_are_read(tmp_path: Path) -> None:
    """Entries are read at the start and by `refresh`. An incomplete line is not read yet.

    An entry of the writer's own file has priority.
    """
    with Journal(tmp_path, writer=1) as other:
        other.append(A, "reply", {"text": "other"})
        with Journal(tmp_path, writer=0) as journal:
            assert journal.get(A) == {"text": "other"}
            other.append(B, "reply", {"text": "later"})
            assert B not in journal
            with (tmp_path / "journal-00001.jsonl").open("ab") as torn:
                torn.write(b'{"crc32":"')
            journal.refresh()
            assert journal.get(B) == {"text": "later"}
    with Journal(tmp_path, writer=2) as third:
        third.append(C, "reply", {"text": "third"})
        assert third.get(A) == {"text": "other"}
    with Journal(tmp_path, writer=1) as other:  # it has removed its own incomplete line
        other.append(C, "reply", {"text": "own"})
        assert other.get(C) == {"text": "own"}
    with Journal(tmp_path, writer=1) as other, Journal(tmp_path, writer=0) as journal:
        assert other.get(C) == {"text": "own"} == journal.get(C)


def test_a_shared_file_system_shows_a_line_in_pieces(tmp_path: Path) -> None:
    """While a writer has the file open, a line with a wrong checksum is ignored, and later it is damage."""
    with Journal(tmp_path, writer=1) as other:
        other.append(A, "reply", {"text": "other"})
        path = tmp_path / "journal-00001.jsonl"
        whole = path.read_bytes()
        path.write_bytes(bytes(20) + whole[20:])
        with Journal(tmp_path, writer=0) as journal:
            assert A not in journal
            path.write_bytes(whole)
            journal.refresh()
            assert A in journal
        path.write_bytes(bytes(20) + whole[20:])
    with pytest.raises(ValueError, match=r"journal-00001.jsonl:1: this line of the journal is damaged"):
        Journal(tmp_path, writer=0)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """The disk accepts only 10 bytes of the second line. The journal continues when there is space."""
    with Journal(tmp_path) as journal:
        journal.append(A, "reply", {"text": "first"})
        real = journal._writing

        class Full:
            def __init__(self) -> None:
                self.left = 10

            def write(self, line: bytes) -> int:
                if not self.left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left = 0
                return real.write(line[:10])

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        journal._writing = Full()  # type: ignore[assignment]
        with pytest.raises(DiskFull, match="No space left on device"):
            journal.append(B, "reply", {"text": "second"})
        assert B not in journal
        journal._writing = real
        journal.append(C, "reply", {"text": "third"})
    with Journal(tmp_path) as journal:
        assert journal.get(C) == {"text": "third"} and len(journal) == 2


def test_memory_holds_places_and_no_entries(tmp_path: Path) -> None:
    """100,000 entries of 1 kB have 100 MB in the file. The process grows by less than 30 MB."""
    code = f"""
import resource
from megatron_post.inference.journal import Journal, key_of
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Journal({str(tmp_path)!r}) as journal:
    before = peak()
    for i in range(100_000):
        journal.append(f"{{i:032x}}", "reply", {{"text": "x" * 1000}})
    print(peak() - before, len(journal))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    grown, count = map(int, done.stdout.split())
    assert count == 100_000 and grown < 30 * 1024
