"""Ranks on which Transformer Engine runs on the CPU, see `stand_in`."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from tests.ranks import run_ranks, server_with
from tests.transformer_engine.stand_in import WHEELS

needs_wheel = pytest.mark.skipif(
    not WHEELS.is_dir(), reason=f"Transformer Engine's pure Python wheels are not in {WHEELS}: make install"
)
_SERVER = server_with("tests.transformer_engine.preload")


def run_with_transformer_engine(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """As `run_ranks`, where `has_transformer_engine()` is true as it is on a GPU that has it."""
    return run_ranks(_on_rank, world_size, function, args, server=_SERVER)


def _on_rank(function: Callable[..., Any], args: Any) -> Any:
    from megatron_post.models import build, specs
    from megatron_post.train import run

    with (
        mock.patch.object(build, "has_transformer_engine", lambda: True),
        mock.patch.object(specs, "has_transformer_engine", lambda: True),
        mock.patch.object(run, "has_transformer_engine", lambda: True),
    ):
        return function(*args)
