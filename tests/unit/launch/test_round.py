"""`launch round FILE`: a round's file is a chain of its steps; what a dry run lists needs neither Slurm nor
models."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_post.cli import app
from megatron_post.config.load import ConfigError
from tests.e2e.runs import ROOT

LOCAL = str(ROOT / "configs" / "clusters" / "local.yaml")
ROUNDS = sorted((ROOT / "configs").glob("*/round.yaml"))


def _launch(file: Path | str, *arguments: str, cluster: str = LOCAL) -> str:
    command = ["launch", "round", str(file), "--cluster", cluster, *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in shipped files are relative to the repository. Slurm is not installed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_a_round_file(at_root: None) -> None:
    """Every step is a job that starts after the one before, and each receives the overrides."""
    text = _launch("configs/tiny/round.yaml", "--dry-run", "--", "rounds=2")
    steps = text.split("\n#\n")[0]
    lines = [line.removeprefix("# ") for line in steps.splitlines() if line.startswith("# round-0")]
    names = [line.split()[0] for line in lines]
    after = [line.split()[4] for line in lines]
    assert names[0] == "round-01/collect" and names[-1] == "round-02/report"
    assert after == ["-", *names[:-1]]
    same = [line.split()[0] for line in lines if "(same job)" in line]
    assert same == [
        f"round-{name}" for name in ("01/sft-pack", "01/report", "02/reward-pack", "02/sft-pack", "02/report")
    ]
    assert f"# {len(names) - len(same)} jobs for {len(names)} steps; each starts once" in text
    by_name = dict(zip(names, lines, strict=True))
    assert by_name["round-01/select"].split()[1:4] == ["1", "x", "1"]
    command = "round configs/tiny/round.yaml --only round-01/select rounds=2"
    assert by_name["round-01/select"].endswith(command)
    assert by_name["round-02/dpo-train"].endswith("train runs/tiny/round/round-02/dpo/config.yaml")
    first = f"command=({shlex.join(['round', 'configs/tiny/round.yaml', '--only', names[0], 'rounds=2'])})"
    assert first in text and "RUN_DIR=runs/tiny/round" in text


@pytest.mark.parametrize("file", ROUNDS, ids=lambda path: path.parent.name)
def test_shipped_rounds(at_root: None, file: Path) -> None:
    """The shipped rounds fit on nodes of 8 H100s."""
    text = _launch(file, "--dry-run", cluster="configs/clusters/h100.yaml")
    assert "round-01/dpo-train" in text


def test_a_chain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are listed in order, and a config that exists is checked against the step's nodes and ranks."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "chain.yaml").write_text(
        "run_dir: runs/r\nsteps:\n"
        "  - {name: sft, command: [train, configs/llama3_8b/sft.yaml], nodes: 3, after: [pack]}\n"
        "  - {name: pack, command: [data, pack, configs/llama3_8b/sft.yaml], ranks_per_node: 200}\n"
    )
    cluster = "configs/clusters/h100.yaml"
    command = ["launch", "round", str(tmp_path / "chain.yaml"), "--cluster", cluster, "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert "# pack  1 x 200        -      data pack configs/llama3_8b/sft.yaml\n" in result.output
    assert "# sft   3 x 8          pack   train configs/llama3_8b/sft.yaml\n" in result.output
    message = str(result.exception)
    assert isinstance(result.exception, ConfigError) and "2 finding(s), nothing was queued" in message
    assert "step 'pack': ranks_per_node=200 is more than cpus_per_node=96 of the cluster" in message
    assert "step 'sft': " in message
    with pytest.raises(ConfigError, match=r"is a chain of commands with overrides of their own: rounds=2"):
        _launch(tmp_path / "chain.yaml", "--", "rounds=2")


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("run_dir: r\nsteps: [{name: a, command: [trian, x.yaml]}]\n")
    with pytest.raises(
        ConfigError, match=r"step 'a': trian x.yaml: no command 'trian' \(did you mean 'train"
    ):
        _launch(tmp_path / "chain.yaml", "--dry-run")


def test_a_file_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("stage: sft\n")
    with pytest.raises(ConfigError, match="stage: unknown key"):
        _launch(tmp_path / "x.yaml", "--dry-run")
