"""A directory of the `peft` library: an adapter's config and tensors. Nothing in it is trusted."""

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_post.config.adapter import TARGETS, Adapter
from megatron_post.config.schema import Config
from megatron_post.config.sections import Model
from megatron_post.convert.adapter_weights import HEAD, MODULES, PREFIX, SUFFIXES, peft_shapes
from megatron_post.convert.contained import contained_file
from megatron_post.convert.safetensors_file import OpenFiles, read_header, read_tensor
from megatron_post.convert.source import check_names
from megatron_post.storage.reading import did_you_mean_path, read_object, reading

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
# PEFT's settings that change what an adapter computes. Only adapters without them can be read.
_UNSUPPORTED = (
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "lora_bias",
    "fan_in_fan_out", "use_qalora", "use_bdlora", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
# Initial values that leave the base model as it is. Others change its weights when PEFT loads the adapter.
_HARMLESS_INIT = (None, True, False, "gaussian", "orthogonal", "eva")


class PeftDirectory:
    """`adapter_config.json` and `adapter_model.safetensors` of a LoRA or DoRA on a Llama.

    settings: of the adapter. base: the path of the base model, or None. head: the tensors of a reward model's
    head that are in the directory. Raises `ValueError` with the file and the fault.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory, self._files = Path(directory), OpenFiles()
        if not os.path.lexists(self.directory / ADAPTER_CONFIG):
            raise ValueError(
                f"{self.directory} holds no {ADAPTER_CONFIG}, so it is no PEFT directory"
                f"{did_you_mean_path(self.directory)}"
            )
        path = contained_file(self.directory, ADAPTER_CONFIG, named_by=self.directory)
        if not os.path.lexists(self.directory / ADAPTER_MODEL):
            found = (
                " (adapter_model.bin is a pickle, which can run code)"
                * (self.directory / "adapter_model.bin").is_file()
            )
            raise ValueError(f"{self.directory} holds no {ADAPTER_MODEL}{found}; save it as safetensors")
        self._path = contained_file(self.directory, ADAPTER_MODEL, named_by=path)
        self._stored = read_header(self._path)
        self.head = [name for name in HEAD if PREFIX + name in self._stored]
        with reading(path, "the config of a LoRA or DoRA"):
            values = read_object(path, "the config of a LoRA or DoRA")
            self.base: str | None = values.get("base_model_name_or_path")
            self.settings = self._settings(path, values)

    def _settings(self, path: Path, values: dict[str, Any]) -> Adapter:
        if values.get("peft_type") != "LORA":
            raise ValueError(f"{path}: peft_type={values.get('peft_type')!r}; only LORA is supported")
        for key in _UNSUPPORTED:
            if values.get(key):
                raise ValueError(
                    f"{path}: {key}={values[key]!r} is not supported; only plain LoRA and DoRA are"
                )
        if values.get("bias", "none") != "none":
            raise ValueError(f"{path}: bias={values['bias']!r}: a Llama has no biases")
        if values.get("init_lora_weights") not in _HARMLESS_INIT:
            raise ValueError(
                f"{path}: init_lora_weights={values['init_lora_weights']!r} changes the base's weights; save "
                "the adapter as a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
            )
        rank, alpha = values["r"], float(values["lora_alpha"])
        if values.get("use_rslora"):
            alpha *= math.sqrt(rank)  # this scales by alpha / sqrt(rank)
        suffixes = {target: f"{MODULES[target]}.{SUFFIXES['A']}" for target in TARGETS}
        targets = [t for t in TARGETS if any(name.endswith(suffixes[t]) for name in self._stored)]
        return Adapter.model_validate(
            {
                "kind": "dora" if values.get("use_dora") else "lora",
                "rank": rank,
                "alpha": alpha,
                "targets": targets,
                "dropout": float(values.get("lora_dropout", 0.0)),
            }
        )

    def check(self, model: Model) -> None:
        """Raises `ValueError` unless the tensors are exactly those of an adapter for this model."""
        shapes = peft_shapes(
            self.settings, model, scalar_head=bool(self.head), scores_steps=len(self.head) == len(HEAD)
        )
        check_names(self._stored, shapes, origin=self._path)
        for name, shape in shapes.items():
            found = self._stored[name]
            if found.shape != shape:
                raise ValueError(f"{self._path}: {name} has shape {found.shape}, expected {shape}")
            if not found.dtype.is_floating_point or found.dtype.itemsize < 2:
                raise ValueError(f"{self._path}: {name} is {found.dtype}: quantized weights cannot be used")

    def has(self, name: str) -> bool:
        """Whether the directory has a tensor."""
        return name in self._stored

    def read(self, name: str) -> Tensor:
        """A whole tensor in its own dtype."""
        return read_tensor(self._files, self._path, self._stored[name])

    @property
    def stamp(self) -> list[Any]:
        """Size, time and layout of the tensors' file, and the settings."""
        status = self._path.stat()
        places = [[name, str(s.dtype), s.offset] for name, s in sorted(self._stored.items())]
        return [status.st_size, status.st_mtime_ns, places, self.settings.model_dump(mode="json")]


def open_start(config: Config) -> PeftDirectory:
    """The adapter of `adapter.init_from`. Raises `ValueError` if the config describes another one."""
    settings = config.adapter
    assert settings is not None and settings.init_from is not None
    found = PeftDirectory(settings.init_from)
    found.check(config.model)
    ignored = {"dropout", "init_from"}
    here, there = (a.model_dump(exclude=ignored) for a in (settings, found.settings))
    wrong = [
        f"adapter.{key}: {_text(here[key])} in the config, {_text(there[key])} there"
        for key in here
        if here[key] != there[key]
    ]
    if len(found.head) > config.traits.scalar_head + config.traits.scores_steps:
        wrong.append(f"it has {found.head[-1]}, which a model of stage={config.stage} has not")
    if wrong:
        raise ValueError(f"{settings.init_from} is another adapter:\n  " + "\n  ".join(wrong))
    return found


def peft_config(
    settings: Adapter, *, base: str | None, scalar_head: bool = False, scores_steps: bool = False
) -> bytes:
    """`adapter_config.json`, with which `peft` and vLLM load an adapter."""
    alpha = settings.alpha
    values = {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if scores_steps else "SEQ_CLS" if scalar_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "use_dora": settings.kind == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": ["score"] if scalar_head else None,
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _text(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else f"{value}"
