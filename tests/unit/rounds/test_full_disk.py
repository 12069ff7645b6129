"""If the disk gets full during a command, it prints one line and keeps what was done.

When there is space again, the same command continues.

The disk is a small tmpfs, which only root may mount.
"""

import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_post.config.load import parse
from megatron_post.convert import jobs
from megatron_post.inference.generate import Generate, generate
from megatron_post.rounds.merge import MergeJob
from megatron_post.rounds.merge_settings import load_merge
from megatron_post.rounds.score import score_file
from megatron_post.rounds.select import select
from megatron_post.rounds.select_settings import Select
from megatron_post.storage.files import read_lines
from tests.ranks import run_ranks
from tests.unit.inference.test_generate import CONSOLE, Parrot
from tests.unit.rounds.models import tiny_policy

Disk = Callable[[int], Path]
FULL = r"No space left on device; .*kept: free some space and run the same command again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A function that makes a disk of a size in KiB, or changes the size if the disk exists."""
    place = tmp_path / "disk"

    def sized(kib: int) -> Path:
        options = f"size={kib}k" if not place.exists() else f"remount,size={kib}k"
        place.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(mount, check=False).returncode:
            pytest.skip("a small disk needs root, which may mount a tmpfs")
        return place

    yield sized
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _prompts(path: Path, count: int) -> Path:
    rows = [{"prompt": f"{i} " + "long " * 1000, "answer": "1"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generate(tmp_path: Path, disk: Disk) -> None:
    """An answer has 10 KB, a prompt of 5 KB and its echo: a disk of 48 KiB takes four of the eight."""
    tiny_policy(tmp_path / "model")
    prompts = _prompts(tmp_path / "prompts.jsonl", 4)
    values = {
        "model": str(tmp_path / "model"),
        "prompts": str(prompts),
        "part": 1,
        "sampling": {"samples": 2},
    }
    settings, output = parse(Generate, values, origin="test"), disk(48) / "out.jsonl"
    with pytest.raises(ValueError, match=FULL):
        generate(settings, output, console=CONSOLE, open_backend=lambda *_: Parrot())
    kept = len(list(read_lines(output.parent / ".partial-out.jsonl" / "journal-00000.jsonl")))
    assert 1 <= kept < 8 and not output.exists()
    disk(1024)
    backend = Parrot()
    generate(settings, output, console=CONSOLE, open_backend=lambda *_: backend)
    assert backend.calls == 4 - kept // 2  # a part of two is drawn as a whole
    generate(settings, tmp_path / "whole.jsonl", console=CONSOLE, open_backend=lambda *_: Parrot())
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_select(tmp_path: Path, disk: Disk) -> None:
    tiny_policy(tmp_path / "model")
    prompts, responses = _prompts(tmp_path / "prompts.jsonl", 4), tmp_path / "responses.jsonl"
    values = {"model": str(tmp_path / "model"), "prompts": str(prompts), "sampling": {"samples": 2}}
    generation = parse(Generate, values, origin="test")
    generate(generation, responses, console=CONSOLE, open_backend=lambda *_: Parrot())
    verifier = {"kind": "exact", "pattern": "([0-9])$"}
    chosen = {"prompts": str(prompts), "samples": [{"responses": str(responses)}], "verifier": verifier}
    settings = parse(Select, {**chosen, "only_correct": False}, origin="test")
    output = disk(16) / "selection"
    with pytest.raises(ValueError, match=rf"sft.jsonl: {FULL}"):
        select(settings, output)
    assert not list(output.iterdir())
    disk(1024)
    assert select(settings, output) == select(settings, tmp_path / "whole")
    for path in output.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_merge(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small a disk is reported before the merge, and a disk that others fill during the merge."""
    for name in "ab":
        tiny_policy(tmp_path / name)
    plan = tmp_path / "merge.yaml"
    plan.write_text(yaml.safe_dump({"models": [{"model": str(tmp_path / name)} for name in "ab"]}))
    size = (tmp_path / "a" / "model.safetensors").stat().st_size // 1024
    output = disk(size // 2) / "merged"
    job = MergeJob(load_merge(plan, "linear").model_dump_json(), str(output), None, 1024 * size // 8)
    with pytest.raises(ValueError, match=r"needs another [\d,]+ bytes and its disk has [\d,]+ free"):
        jobs.convert(job, workers=1, report=print)
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(2**40))
        with pytest.raises(
            ValueError, match=rf"No space left on device; .* [1-9] of {len(job.parts)} parts are"
        ):
            jobs.convert(job, workers=1, report=print)
    assert not output.exists()
    disk(4 * size)
    said: list[str] = []
    jobs.convert(job, workers=1, report=said.append)
    assert "parts are complete" in said[0]
    merged = {n: t for file in output.glob("*.safetensors") for n, t in load_file(file).items()}
    assert all(torch.equal(merged[n], t) for n, t in load_file(tmp_path / "a" / "model.safetensors").items())


def test_score(tmp_path: Path, disk: Disk) -> None:
    """300 rows of about 40 bytes do not fit on 8 KiB, but some or all of the first 256 do."""
    tiny_policy(tmp_path / "model", scalar_head=True)
    rows = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a b"}]
    rows.write_text((json.dumps({"messages": said}) + "\n") * 300)
    place = disk(8)
    run_ranks(_score_on_a_full_disk, 1, str(tmp_path), str(place))
    disk(1024)
    assert run_ranks(score_file, 1, tmp_path / "model", rows, place / "scores.jsonl")[0].written < 300
    assert [row["row"] for row in read_lines(place / "scores.jsonl")] == list(range(1, 301))


def _score_on_a_full_disk(tmp_path: str, place: str) -> None:
    with pytest.raises(ValueError, match=rf"scores.jsonl: {FULL}"):
        score_file(f"{tmp_path}/model", f"{tmp_path}/rows.jsonl", f"{place}/scores.jsonl")
