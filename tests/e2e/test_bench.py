"""The bench commands as a user runs them."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_post import cli
from megatron_post.bench.record import Figure, Record, write_record
from megatron_post.config.load import to_yaml
from tests.e2e.runs import start
from tests.tiny import tiny_config


def _config(directory: Path) -> str:
    path = directory / "tiny.yaml"
    path.write_text(to_yaml(tiny_config(directory / "run", data={"store": str(directory / "store")})))
    return str(path)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-post", "bench", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process runs other tests afterwards
    cli.main()


def test_steps_on_two_ranks(tmp_path: Path) -> None:
    """Under torchrun with TP 2 there are one table and one record, and no other files."""
    output, log = tmp_path / "out", tmp_path / "log"
    command = ["bench", "step", _config(tmp_path), "parallel.tensor=2", "--steps", "2", "--warmup", "1"]
    assert start([*command, "--output", str(output)], ranks=2, log=log).wait(timeout=600) == 0, (
        log.read_text()
    )
    (path,) = output.iterdir()
    record = json.loads(path.read_text())
    assert record["benchmark"] == "step" and record["settings"]["overrides"] == "parallel.tensor=2"
    assert record["settings"]["ranks"] == "2" and record["settings"]["layout"].startswith("TP 2")
    assert len(record["figures"]["step"]["samples"]) == 2
    assert set(record["environment"]) >= {"date", "GPU", "torch", "megatron-core", "triton", "commit", "load"}
    assert f"written to {path}" in log.read_text() and "synthetic" in log.read_text()
    assert not (tmp_path / "run").exists()


def test_proxy_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A proxy first prints that it is a proxy. Its record is on the page."""
    options = ["--proxy-rank", "1", "--world", "4", "--steps", "1", "--warmup", "0"]
    with pytest.raises(SystemExit) as done:
        _main(
            monkeypatch,
            "step",
            _config(tmp_path),
            "parallel.tensor=2",
            *options,
            "--output",
            str(tmp_path / "out"),
        )
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("PROXY, COMPUTE ONLY")
    with pytest.raises(SystemExit):
        _main(monkeypatch, "report", str(tmp_path / "out"))
    assert "rank 1 of 4" in (tmp_path / "out" / "report.html").read_text()


def test_report_names_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for day, seconds in (("2026-11-21", 2.0), ("2026-11-22", 1.0)):
        figures = {"step": Figure("s", tuple(seconds + i / 100 for i in range(8)), "lower")}
        write_record(tmp_path, Record("step", "sft, a.yaml", {}, figures, {"date": day}))
    with pytest.raises(SystemExit):
        _main(monkeypatch, "report", str(tmp_path), "--html", str(tmp_path / "page.html"))
    assert "step (sft, a.yaml), 2 runs: step -49.1%: better" in capsys.readouterr().out
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "missing.yaml"], "config file missing.yaml does not exist"),
        (["step", "CONFIG", "--steps", "0"], "--steps 0 --warmup 3: want at least 1 step"),
        (
            ["step", "CONFIG", "--proxy-rank", "9", "--world", "8"],
            "--proxy-rank 9 is not a rank of --world 8",
        ),
        (["step", "CONFIG", "--world", "8"], "describe a proxy; give --proxy-rank as well"),
        (
            ["step", "CONFIG", "parallel.tensor=2"],
            "1 ranks are not a multiple of tensor x pipeline x context = 2",
        ),
        (["report", "nothing"], "nothing does not exist; run `megatron-post bench step"),
        (["convert", "--model", "9B"], "choose from '8B, 2 layers'"),
        (["merge", "--gigabytes", "3"], "--gigabytes 3: choose from 1, 2, 4"),
        (["data", "--rounds", "0"], "--rounds 0: want at least 1"),
        (["checkpoint", "--every", "0"], "--every 0"),
    ],
)
def test_refusals(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config(tmp_path)
    with pytest.raises(SystemExit) as done:
        _main(monkeypatch, *(config if text == "CONFIG" else text for text in arguments))
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_terminated_benchmark_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM, as from a batch system, arrives while gigabytes of scratch files are written."""
    command = ["bench", "convert", "--directory", str(tmp_path / "disk"), "--output", str(tmp_path / "out")]
    process = start(command, ranks=1, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("disk/*/source/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert not list((tmp_path / "disk").iterdir())
