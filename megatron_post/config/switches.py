"""Performance switches: what each of them needs. None of them changes what a run computes.

The names are Megatron's. Every refusal repeats a check of megatron-core or Transformer Engine, which would
otherwise fail on the nodes.
"""

from typing import TYPE_CHECKING, Any

from megatron_post.installation import install_command

if TYPE_CHECKING:
    from megatron_post.config.schema import Config

# Switches of Transformer Engine's modules, which the portable layers do not have.
_OF_TRANSFORMER_ENGINE = ("optimizer.gradient_accumulation_fusion",)


def switch_errors(config: "Config") -> list[str]:
    """Every reason why a switch that is on cannot work in this config; empty if all can."""
    return _layer_errors(config) + _gather_errors(config)


def _layer_errors(config: "Config") -> list[str]:
    reasons = {
        "precision.dtype=fp32": config.precision.dtype == "fp32",
        f"reward.layout={config.reward.layout}": config.shares_prompts,
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is None:
        return []
    return [
        f"{key}={_text(value)} needs Transformer Engine's layers, and {reason} runs the portable ones; set "
        f"{key}={_text(off)}"
        for key, value, off in _on(config)
    ]


def _gather_errors(config: "Config") -> list[str]:
    key, o, p = "optimizer.overlap_param_gather_with_optimizer_step", config.optimizer, config.parallel
    if not o.overlap_param_gather_with_optimizer_step:
        return []
    needs = {
        "optimizer.overlap=true": o.overlap,
        f"parallel.virtual_pipeline > 1, not {p.virtual_pipeline}": p.virtual_pipeline > 1,
    }
    return [f"{key}=true needs {text}; set {key}=false" for text, holds in needs.items() if not holds]


def switch_machine_errors(config: "Config", *, has_gpu: bool, has_transformer_engine: bool) -> list[str]:
    """Every reason why a switch that is on cannot work on this machine; empty if all can."""
    if has_gpu and has_transformer_engine:
        return []
    missing = "a GPU" if not has_gpu else f"Transformer Engine (install it: {install_command('cuda')})"
    return [
        f"{key}={_text(value)} needs {missing}; set {key}={_text(off)}" for key, value, off in _on(config)
    ]


def _on(config: "Config") -> list[tuple[str, Any, Any]]:
    """(key, value, value that switches it off) of the switches of Transformer Engine that are on."""
    found = []
    for key in _OF_TRANSFORMER_ENGINE:
        section_name, name = key.split(".")
        section = getattr(config, section_name)
        value, off = getattr(section, name), type(section).model_fields[name].default
        if value != off:
            found.append((key, value, off))
    return found


def _text(value: Any) -> str:
    """A value as an override writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
