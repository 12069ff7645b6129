"""The shipped files of curation."""

from pathlib import Path
from typing import Any, get_args

import pytest

from megatron_post.curation.rules import load_rules
from megatron_post.curation.settings import load_curation
from megatron_post.curation.steps import AnyStep

ROOT = Path(__file__).resolve().parents[3]


def test_the_shipped_file_uses_every_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = load_curation("configs/curation/sft.yaml")
    union: Any = get_args(AnyStep)[0]
    unused = {*get_args(union)} - {type(step) for step in settings.steps}
    assert {kind.__name__ for kind in unused} <= {"Tokens"}  # only a mixture needs the counts of tokens


def test_all_rules_can_be_used_together() -> None:
    files = ("cleaning.yaml", "boilerplate.yaml", "masks.yaml")
    names = [rule.name for file in files for rule in load_rules(ROOT / "configs/curation" / file)]
    assert len(names) == len({*names})
