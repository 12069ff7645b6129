"""`launch CONFIG` works without the word `submit`, and a dry run prints the script and the placement."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_post.config.load import ConfigError
from megatron_post.launch.cluster import load_cluster
from megatron_post.launch.commands import launch_app
from megatron_post.launch.script import Job, render
from tests.e2e.runs import ROOT

H100 = str(ROOT / "configs" / "clusters" / "h100.yaml")


def _launch(*arguments: str) -> str:
    result = CliRunner().invoke(launch_app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_dry_run() -> None:
    """It prints the sbatch line, the script with quoted values and the placement, and writes no file."""
    config = str(ROOT / "configs" / "llama3_405b" / "sft.yaml")
    text = _launch(
        config, "--cluster", H100, "--nodes", "128", "--name", "$(rm -rf ~)", "--dry-run", "--", "run_dir=a b"
    )
    assert "# sbatch --parsable '--job-name=$(rm -rf ~)' --nodes=128 --ntasks-per-node=8" in text
    assert f"command=(train {config} 'run_dir=a b')" in text and "RUN_DIR='a b'" in text
    assert "export NCCL_DEBUG=WARN" in text
    assert "# TP 8: inside a node" in text and "# DP 2: over 2 nodes, ranks 0, 64, ..." in text
    assert "# node 127: ranks 1016-1023" in text
    assert not Path("a b").exists()


def test_a_dry_run_hides_secrets(tmp_path: Path) -> None:
    """Users paste its output into tickets. The script that is submitted contains the secrets."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"base: {H100}\nenvironment: {{SITE_TOKEN: s3cr3t, PLAIN: text,"
        " http_proxy: 'http://me:s3cr3t@proxy:80'}\n"
        "container: {image: 'docker://me:s3cr3t@registry#image'}\n"
    )
    text = _launch(str(ROOT / "configs/llama3_70b/sft.yaml"), "--cluster", str(cluster), "--dry-run")
    assert "export SITE_TOKEN='***'" in text and "export PLAIN=text" in text and "http://***@proxy:80" in text
    assert "s3cr3t" not in text
    job = Job("run", ("train", "c.yaml"), "run", tmp_path)
    assert "export SITE_TOKEN=s3cr3t" in render(job, load_cluster(cluster))


def test_the_fewest_nodes_by_default() -> None:
    text = _launch(str(ROOT / "configs/llama3_70b/sft.yaml"), "--cluster", H100, "--dry-run")
    assert "--nodes=8 " in text


def test_errors_of_both_files_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("stage: sft\n")
    (tmp_path / "cluster.yaml").write_text("gpus: 8\n")
    with pytest.raises(ConfigError) as error:
        _launch(str(tmp_path / "run.yaml"), "--cluster", str(tmp_path / "cluster.yaml"))
    assert "run_dir: missing" in str(error.value) and "gpus: unknown key" in str(error.value)


def test_a_layout_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1016 ranks are not a multiple of"):
        _launch(str(ROOT / "configs/llama3_405b/sft.yaml"), "--cluster", H100, "--nodes", "127", "--dry-run")


@pytest.mark.parametrize("command", ["status", "cancel", "logs"])
def test_nothing_was_launched(tmp_path: Path, command: str) -> None:
    with pytest.raises(ValueError, match="nothing was launched for"):
        _launch(command, str(tmp_path))
