"""The pages of the first 8B and 405B runs: what a dry run can show of them works, and their figures are the
planner's."""

import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_post.cli import app
from megatron_post.config.load import load_config
from megatron_post.plan.estimate import make_plan
from megatron_post.plan.hardware import gpu
from tests.documentation import ROOT, arguments, blocks, commands

PAGES = {"first_8b_run.md": 2, "405b.md": 6}  # and how many commands of each are run here


@pytest.mark.parametrize("name", PAGES)
def test_dry_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` and `launch --dry-run`, and `convert plan`, as the page has them."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")  # files of pages are written into it
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "docs" / name)
    for block in found:
        if block.title:
            Path(block.title).write_text(block.text)
    texts = [block.text for block in found if block.language == "bash"]
    ours = [words for text in texts for command in commands(text) if (words := arguments(command))]
    dry = [words for words in ours if "--dry-run" in words or ("plan" in words[:2] and "search" not in words)]
    assert len(dry) == PAGES[name]
    for words in dry:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize("gpus", [512, 1024])
@pytest.mark.parametrize("tokens", [131072, 1000])
def test_days_and_gpu_hours_of_405b(gpus: int, tokens: int) -> None:
    """The table rounds, and the planner may learn: a tenth is the limit."""
    rows = [line.split("|") for line in (ROOT / "docs/405b.md").read_text().splitlines()]
    (row,) = [
        [cell.strip().replace(",", "") for cell in cells[1:-1]]
        for cells in rows
        if len(cells) == 7 and cells[1].strip() == str(gpus) and f"{tokens:,} tokens" in cells[2]
    ]
    config = load_config(ROOT / "configs/llama3_405b/sft.yaml")
    plan = make_plan(config, gpus=gpus, gpu=gpu("h100-80gb"), segment_length=tokens)
    seconds = plan.time.seconds
    days = seconds * config.train.steps / 86400
    assert [float(cell) for cell in row[2:]] == pytest.approx([seconds, days, days * 24 * gpus], rel=0.1)
