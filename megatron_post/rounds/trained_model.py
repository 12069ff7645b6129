"""Loads a trained model from its directory and runs its forward pass on these ranks."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_post.config.load import validate
from megatron_post.config.schema import Config
from megatron_post.convert.configs import read_model
from megatron_post.models.build import uses_portable_attention
from megatron_post.parallel.environment import rank_from_environment
from megatron_post.parallel.topology import Topology
from megatron_post.stages.base import Stage
from megatron_post.train.inputs import check_run
from megatron_post.train.parts import joined_ranks, load_model, make_stage
from megatron_post.train.step import Stepper


def config_of_model(directory: str | Path, values: dict[str, Any], overrides: Sequence[str]) -> Config:
    """A config for a model in a Hugging Face directory. values: further sections of the config."""
    model = read_model(Path(directory)).model_dump() | {"init_from": str(directory)}
    # Nothing is trained. A batch of as many packs as ranks is valid for any number of data-parallel ranks.
    _, world_size, _ = rank_from_environment()
    base = {
        "run_dir": "unused",
        "model": model,
        "tokenizer": {"path": str(directory)},
        "train": {"steps": 1, "global_batch": world_size},
    }
    return validate(base | values, overrides, origin=str(directory))


@contextlib.contextmanager
def running_model(config: Config) -> Iterator[tuple[Stepper, Stage, Topology]]:
    """The model on these ranks, for forward passes only. Raises `ConfigError` if it cannot run here."""
    check_run(config)
    with joined_ranks(config) as topology, torch.no_grad():
        stage = make_stage(config, topology)
        chunks = load_model(config, topology)
        for chunk in chunks:
            chunk.eval()
        yield Stepper(chunks, stage, topology, portable=uses_portable_attention(config)), stage, topology
