"""`reference` uses the content tokens of the store, and `score` those of the command line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_post.config.schema import Config
from megatron_post.data.store_format import StoreSettings
from megatron_post.data.tokenizer import load_tokenizer, tokenizer_of
from megatron_post.rounds import reference, score
from tests.unit.data.thinking import THINK, add_think
from tests.unit.rounds.models import tiny_policy


class _ConfigSeen(Exception):
    """Raised with the config with which a model would run."""


@contextlib.contextmanager
def _never_running(config: Config) -> Iterator[None]:
    raise _ConfigSeen(tokenizer_of(config).content_tokens)
    yield


def test_the_reference_reads_the_stores_content_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_think(tiny_policy(tmp_path))
    fingerprint = load_tokenizer(tmp_path, content_tokens=THINK).fingerprint
    settings = StoreSettings(64, 1, fingerprint, 0, 1, "separate", str(tmp_path), content_tokens=THINK)
    monkeypatch.setattr(reference, "read_settings", lambda _: settings)
    monkeypatch.setattr(reference, "running_model", _never_running)
    with pytest.raises(_ConfigSeen, match="<think>"):
        reference.write_reference(tmp_path / "store", tmp_path)


def test_scores_take_them_from_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_think(tiny_policy(tmp_path, scalar_head=True))
    monkeypatch.setattr(score, "running_model", _never_running)
    with pytest.raises(_ConfigSeen, match="<think>"):
        score.score_file(tmp_path, "rows", tmp_path / "o", ["tokenizer.content_tokens=[<think>,</think>]"])
