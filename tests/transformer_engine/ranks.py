"""Ranks on which Transformer Engine runs on the CPU, see `stand_in`."""

import functools
import os
from collections.abc import Callable
from multiprocessing.forkserver import ForkServer
from typing import Any
from unittest import mock

import pytest

from tests.ranks import run_ranks, server_with
from tests.transformer_engine.stand_in import WHEELS

VERSION = "2.11.0"
needs_wheel = pytest.mark.skipif(
    not (WHEELS / VERSION).is_dir(),
    reason=f"Transformer Engine's pure Python wheel is not in {WHEELS / VERSION}: make install",
)


def run_with_transformer_engine(
    function: Callable[..., Any], world_size: int, *args: Any, version: str = VERSION
) -> list[Any]:
    """As `run_ranks`, where `has_transformer_engine()` is true as it is on a GPU that has this version."""
    return run_ranks(_on_rank, world_size, function, args, server=_server(version))


@functools.cache
def _server(version: str) -> ForkServer:
    """Starts in seconds, once for each version."""
    server = server_with("tests.transformer_engine.preload")
    with mock.patch.dict(os.environ, TRANSFORMER_ENGINE_VERSION=version):
        server.ensure_running()
    return server


def _on_rank(function: Callable[..., Any], args: Any) -> Any:
    from megatron_post.models import build, specs
    from megatron_post.train import inputs

    with (
        mock.patch.object(build, "has_transformer_engine", lambda: True),
        mock.patch.object(specs, "has_transformer_engine", lambda: True),
        mock.patch.object(inputs, "has_transformer_engine", lambda: True),
    ):
        return function(*args)
