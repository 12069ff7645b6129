"""The first data commands of a fresh clone need no other file than those of the repository."""

from pathlib import Path

import pytest

from megatron_post.config.load import load_config
from megatron_post.data.build import build_store
from megatron_post.data.store import open_store
from megatron_post.display import make_console
from tests.documentation import ROOT


@pytest.mark.parametrize(("name", "rows"), [("sample", 200), ("sample_dpo", 60)])
def test_sample_data_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(f"configs/tiny/{name}.yaml", [f"run_dir={tmp_path}"])
    build_store(config, console=make_console(quiet=True))
    store = open_store(config.data.store, "train")
    assert sum(len(store.read(index).cu_seqlens) - 1 for index in range(len(store))) >= rows
