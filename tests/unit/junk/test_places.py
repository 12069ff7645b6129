"""Places where nothing can be written, and programs that are not there: one line, and no waiting."""

import os
import sys
from pathlib import Path

import pytest

from megatron_post import cli
from tests.unit.junk.runner import Copy, limits

# OUT stands for the place
WRITERS = (
    "data pack sft.yaml data.store=OUT",
    "train sft.yaml run_dir=OUT",
    "convert hf-to-megatron model OUT",
    "convert megatron-to-hf converted OUT",
    "merge linear --config merge.yaml --output OUT",
    "generate generate.yaml --output OUT",
    "annotate export OUT samples.jsonl --key key.jsonl",
    "annotate export pages samples.jsonl --key OUT",
    "annotate import annotate answers.jsonl --key annotate-key.jsonl --output OUT",
    "select select.yaml --output OUT",
    "score reward rows.jsonl --output OUT",
    "round round.yaml run_dir=OUT",
    "round round.yaml run_dir=new --chain OUT",
    "plan show sft.yaml --gpus 2 --html OUT",
    "plan search sft.yaml --gpus 2 --output OUT",
    "bench report bench --html OUT",
    "report run --html OUT",
)
PLACES = {
    "read-only": "/proc/nothing/below",  # root can write to nearly every other
    "below a file": "sft.yaml/below",
    "pipe": "pipe",
    "too long": "a" * 300,
}


def _message(words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["megatron-post", *words.split()])
    with limits(), pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in shown, shown
    return shown


@pytest.mark.parametrize("place", PLACES)
def test_what_cannot_be_written(
    place: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Copy(world, tmp_path / "w")
    for words in WRITERS:
        copy.heal()
        os.mkfifo("pipe")
        if place == "pipe" and words.startswith(("select", "annotate", "round round.yaml run_dir=new")):
            continue  # a file or a directory takes its place
        shown = _message(words.replace("OUT", PLACES[place]), capfd, monkeypatch)
        names = (PLACES[place], PLACES[place].split("/")[0] or "/proc", "not a directory")
        assert any(name in shown for name in names), (words, shown)


def test_programs_that_are_not_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Copy(world, tmp_path / "w").heal()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "squeue is not on the PATH" in _message("launch status run", capfd, monkeypatch)
    words = "launch sft.yaml --cluster cluster.yaml"
    assert "sbatch is not on the PATH" in _message(words, capfd, monkeypatch)
    assert "tail: No such file" in _message("launch logs run --follow", capfd, monkeypatch)
