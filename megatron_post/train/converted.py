"""Checks that a run can start from a converted checkpoint, which has only weights."""

from pathlib import Path
from typing import Any

from megatron_post.config.schema import Config
from megatron_post.convert.configs import read_model
from megatron_post.convert.hf_config import differences


def check_weights(directory: Path, stored: dict[str, Any], config: Config) -> None:
    """Raises `ValueError` if converted weights do not belong to the config's model.

    stored: the `state` of the checkpoint's manifest.
    """
    wrong = differences(config.model, read_model(directory))
    scores_steps = stored.get("scores_steps", False)
    if (stored["scalar_head"], scores_steps) != (config.traits.scalar_head, config.traits.scores_steps):
        of_scores = "a reward model's of steps" if scores_steps else "a reward model's"
        kind = of_scores if stored["scalar_head"] else "a language model's"
        wrong.append(f"stage={config.stage}, and the weights are {kind}")
    if config.needs_reference and config.model.init_from is None:
        wrong.append("the reference needs model.init_from, the directory that was converted")
    if config.adapter is not None:
        wrong.append("a run with an adapter starts from model.init_from, a Hugging Face directory")
    if wrong:
        raise ValueError(f"{directory} cannot start this run:\n  " + "\n  ".join(wrong))
