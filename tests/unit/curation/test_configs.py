"""The shipped files of curation."""

from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_post.curation.rules import load_rules
from megatron_post.curation.settings import load_curation, users_of_gpus
from megatron_post.curation.steps import AnyStep
from megatron_post.launch.curation import launch_curation

ROOT = Path(__file__).resolve().parents[3]


def test_the_shipped_file_uses_every_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = load_curation("configs/curation/sft.yaml")
    union: Any = get_args(AnyStep)[0]
    unused = {*get_args(union)} - {type(step) for step in settings.steps}
    assert not unused


def test_the_shipped_file_can_be_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mixture names an existing config, and only the encoder uses GPUs."""
    monkeypatch.chdir(ROOT)
    settings = load_curation("configs/curation/sft.yaml")
    assert settings.mixture is not None and Path(settings.mixture.config or "").is_file()
    assert users_of_gpus(settings) == ["the step semantic_duplicates"]
    launch_curation("configs/curation/sft.yaml", "configs/clusters/h100.yaml", processes=8, dry_run=True)
    assert "--array=0-7" in capsys.readouterr().out


def test_all_rules_can_be_used_together() -> None:
    files = ("cleaning.yaml", "boilerplate.yaml", "masks.yaml")
    names = [rule.name for file in files for rule in load_rules(ROOT / "configs/curation" / file)]
    assert len(names) == len({*names})
