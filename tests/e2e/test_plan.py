"""The plan commands as a user runs them, on the configs of this repository."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SFT_405B = "configs/llama3_405b/sft.yaml"
DPO_405B = "configs/llama3_405b/dpo.yaml"


def _plan(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_post", "plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_plan(tmp_path: Path) -> None:
    """405B as the repository configures it fits on 512 H100s, and the page is written."""
    page = tmp_path / "plan.html"
    done = _plan(SFT_405B, "--gpus", "512", "--gpu", "h100-80gb", "--json", "--html", str(page))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["parameters"] == 405_853_388_800 and len(found["memory"]) == 8
    assert page.read_text().startswith("<!doctype html>")


def test_a_table_for_the_terminal() -> None:
    done = _plan("configs/llama3_8b/sft.yaml", "--gpus", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fits: pipeline rank 0" in done.stdout and "MFU" in done.stdout


def test_a_refusal_names_what_fits() -> None:
    """A plan that does not fit ends with status 1."""
    done = _plan(SFT_405B, "--gpus", "512", "--", "recompute.mode=none")
    assert done.returncode == 1, done.stderr
    assert "GiB too much" in done.stdout and "recompute.mode=full fits" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SFT_405B, "--gpus", "100"), "100 ranks are not a multiple of tensor x pipeline x context = 512"),
        ((SFT_405B, "--gpus", "512", "--gpu", "a100"), "choose one of h100-80gb, h200-141gb, b200-180gb"),
        (("dry-run", SFT_405B, "--gpus", "512", "--gpus-per-node", "4"), "would cross nodes"),
        (("dry-run", SFT_405B, "--gpus", "512", "--rank", "x"), "--rank x: want a number or `all`"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    done = _plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def _processor_seconds() -> float:
    """Processor seconds of all children so far. The load of the machine changes them little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_search_of_512_gpus(tmp_path: Path) -> None:
    """The search takes at most 60 seconds of processor time.

    The written config is the winner that was printed.
    """
    winner, began = tmp_path / "winner.yaml", _processor_seconds()
    done = _plan("search", DPO_405B, "--gpus", "512", "--json", "--output", str(winner), timeout=900)
    assert done.returncode == 0, done.stderr
    seconds = _processor_seconds() - began
    print(f"search: {seconds:.1f} s of processor")
    assert seconds < 60
    best = json.loads(done.stdout)["plans"][0]
    again = json.loads(_plan(str(winner), "--gpus", "512", "--json").stdout)
    assert again["fits"] and again["seconds"] == pytest.approx(best["seconds"])


@pytest.mark.slow
def test_dry_run_of_16384_ranks() -> None:
    """Every stage of 405B is built within 60 seconds of processor time and 4 GB."""
    began = _processor_seconds()
    done = _plan("dry-run", DPO_405B, "--gpus", "16384", "--rank", "all", "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    seconds = _processor_seconds() - began
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"dry run: {seconds:.1f} s of processor, {most / 1e6:.2f} GB")
    assert seconds < 60 and most < 4e6
    found = json.loads(done.stdout)
    assert found["model_parameters"] == 405_853_388_800 and len(found["stages"]) == 8
    assert found["groups"]["data"] == [64, 256]
