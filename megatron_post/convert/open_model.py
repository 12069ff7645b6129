"""Opens a directory as the kind of model that it holds."""

import os
from pathlib import Path

from megatron_post.convert.adapted_model import AdaptedModel
from megatron_post.convert.hf_directory import HuggingFaceDirectory
from megatron_post.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_post.convert.meta_source import PARAMS, MetaDirectory
from megatron_post.convert.peft_directory import ADAPTER_CONFIG
from megatron_post.convert.source import ModelSource
from megatron_post.storage import manifest
from megatron_post.storage.hub import model_directory
from megatron_post.storage.reading import did_you_mean_path


def open_weights_directory(directory: Path) -> ModelSource:
    """Hugging Face's safetensors or Meta's original files. Raises `ValueError` for anything else.

    directory: may be a model of the hub, see `model_directory`.
    """
    directory = model_directory(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory{did_you_mean_path(directory)}")
    if os.path.lexists(directory / PARAMS) and not os.path.lexists(directory / "config.json"):
        return MetaDirectory(directory)
    if not os.path.lexists(directory / "config.json"):
        inner = [path.name for path in (directory / "checkpoints", directory / "hf") if path.is_dir()]
        raise ValueError(
            f"{directory} holds no config.json of Hugging Face and no {PARAMS} of Meta"
            + (f"; did you mean its {' or '.join(inner)}?" if inner else "")
        )
    return HuggingFaceDirectory(directory)


def open_model(directory: Path) -> ModelSource:
    """A model of any kind: Hugging Face or Meta weights, a checkpoint, or a PEFT directory with its base.

    Of a run's checkpoints the newest step is opened. An adapter is merged with its base while it is read.

    Raises `ValueError` if the directory cannot be read or holds no model.
    """
    try:
        # A directory with a config of its own holds a whole model, whatever else is beside it.
        has_config = os.path.lexists(directory / "config.json")
        if os.path.lexists(directory / ADAPTER_CONFIG) and not has_config:
            return AdaptedModel(directory)
        if (directory / manifest.MANIFEST).is_file() or manifest.published_steps(directory):
            return MegatronCheckpoint(directory)
        return open_weights_directory(directory)
    except OSError as error:
        raise ValueError(f"{error.filename or directory}: {error.strerror or error}") from error
