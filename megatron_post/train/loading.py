"""Weights, and the optimizer's state, from a checkpoint of any layout into the layout of this run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.optimizer import MegatronOptimizer

from megatron_post.models.llama import Llama
from megatron_post.train.manifest import read_metadata

# Optimizer state laid out by parameter and not by bucket, so that any layout can resume it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def load_models(
    directory: Path, models: Sequence[Llama], *, optimizer: MegatronOptimizer | None = None
) -> None:
    """Load the models' weights and, if it is given, the optimizer's state. All ranks call it.

    What modules keep beside tensors, such as FP8's scales, begins afresh where the checkpoint has none: it
    was converted, or the portable layers wrote it.
    """
    stored = read_metadata(directory / ".metadata").state_dict_metadata
    states: dict[str, Any] = {}
    afresh: list[dict[str, None]] = []
    for i, model in enumerate(models):
        state = model.sharded_state_dict(metadata=METADATA)
        absent = [k for k in state if k.endswith("_extra_state") and state[k].unique_key not in stored]
        afresh.append(dict.fromkeys(absent))
        states[f"model{i}"] = {key: value for key, value in state.items() if key not in afresh[i]}
    if optimizer is not None:
        states["optimizer"] = optimizer.sharded_state_dict(states, is_loading=True, metadata=METADATA)
    loaded = dist_checkpointing.load(
        states, str(directory), get_default_load_sharded_strategy(str(directory))
    )
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"] | afresh[i], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
