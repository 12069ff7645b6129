"""Starting a run from a converted checkpoint, which has weights and nothing else."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.optimizer import MegatronOptimizer

from megatron_post.config.schema import Config
from megatron_post.convert.configs import read_model
from megatron_post.models.hf_config import differences
from megatron_post.models.llama import Llama


def check_weights(directory: Path, stored: dict[str, Any], config: Config) -> None:
    """Raises `ValueError` where converted weights are not those of the config's model.

    stored: the manifest's `state`.
    """
    wrong = differences(config.model, read_model(directory))
    if stored["scalar_head"] != (config.stage == "reward"):
        kind = "a reward model's" if stored["scalar_head"] else "a language model's"
        wrong.append(f"stage={config.stage}, and the weights are {kind}")
    if config.stage == "dpo" and config.dpo.needs_reference and config.model.init_from is None:
        wrong.append("the reference needs model.init_from, the directory that was converted")
    if wrong:
        raise ValueError(f"{directory} cannot start this run:\n  " + "\n  ".join(wrong))


def start_from_weights(
    directory: Path, models: list[Llama], optimizer: MegatronOptimizer, *, metadata: dict[str, Any]
) -> None:
    """Load the weights in whatever layout this run has; the optimizer begins afresh from them.

    metadata: what `sharded_state_dict` is told everywhere.
    """
    wanted: dict[str, Any] = {}
    afresh: list[dict[str, None]] = []
    for i, model in enumerate(models):
        state = model.sharded_state_dict(metadata=metadata)
        # what modules keep beside tensors, such as FP8's scales
        afresh.append({key: None for key in state if key.endswith("_extra_state")})
        wanted[f"model{i}"] = {key: value for key, value in state.items() if key not in afresh[-1]}
    strategy = get_default_load_sharded_strategy(str(directory))
    loaded = dist_checkpointing.load(wanted, str(directory), strategy)
    for i, model in enumerate(models):
        model.load_state_dict(loaded[f"model{i}"] | afresh[i], strict=True)
    optimizer.reload_model_params()
