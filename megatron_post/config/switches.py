"""The requirements of each performance switch. No switch changes the result of a run.

The names are Megatron's. Every error here corresponds to a check of megatron-core or Transformer Engine,
which would otherwise fail on the nodes.
"""

import re
from typing import Any

from megatron_post.config.sections import UncheckedConfig
from megatron_post.installation import install_command

# Switches of Transformer Engine's modules, which the portable layers do not have.
_OF_TRANSFORMER_ENGINE = (
    "optimizer.gradient_accumulation_fusion",
    "parallel.tp_comm_overlap",
    "parallel.cp_comm_type",
    "precision.fp8_param_gather",
)
_OF_ATTENTION = ("parallel.cp_comm_type",)
# switch -> the first version that has it, and what it has
_SINCE = {
    "parallel.cp_comm_type": ((2, 10), "for packed rows"),
    "precision.fp8_param_gather": ((2, 10), "to transpose FP8 weights after they were gathered"),
}


def switch_errors(config: UncheckedConfig) -> list[str]:
    """Every reason why a switch that is on cannot work in this config. Empty if all can."""
    found = (_layer_errors, _tensor_errors, _context_errors, _gather_errors, _weight_errors)
    return [error for errors in found for error in errors(config)]


def _layer_errors(config: UncheckedConfig) -> list[str]:
    if config.precision.dtype == "fp32":
        part, other = "layers", "precision.dtype=fp32 runs the portable ones"
    elif config.shares_prompts:
        layout = f"dpo.layout={config.dpo.layout}"
        if config.traits.examples == "preferences":
            layout = f"reward.layout={config.reward.layout}"
        part, other = "attention", f"{layout} runs the portable one"
    else:
        return []
    return [
        f"{key}={_text(value)} needs Transformer Engine's {part}, and {other}; set {key}={_text(off)}"
        for key, value, off in switches_on(config)
        if part == "layers" or key in _OF_ATTENTION
    ]


def _tensor_errors(config: UncheckedConfig) -> list[str]:
    p, recipe = config.parallel, config.precision.fp8
    if not p.tp_comm_overlap:
        return []
    key, off, errors = "parallel.tp_comm_overlap=true", "parallel.tp_comm_overlap=false", []
    if p.tensor == 1:
        errors.append(f"{key} needs parallel.tensor > 1; set {off}")
    elif not p.sequence:
        errors.append(f"{key} needs parallel.sequence=true; set it, or {off}")
    # see fill_userbuffers_buffer_for_all_gather in transformer_engine/pytorch/module/base.py
    if recipe == "blockwise":
        errors.append(
            f"{key} has no buffers for precision.fp8=blockwise; set precision.fp8=tensorwise, or {off}"
        )
    share = config.data.pack_length // (p.context * p.tensor)
    if recipe == "mxfp8" and share % 128:
        errors.append(
            f"{key} with precision.fp8=mxfp8 needs a multiple of 128 tokens on a rank, and data.pack_length="
            f"{config.data.pack_length} over parallel.context={p.context} and parallel.tensor={p.tensor} is "
            f"{share}; set data.pack_length to a multiple of {128 * p.context * p.tensor}, or {off}"
        )
    return errors


def _context_errors(config: UncheckedConfig) -> list[str]:
    m, p = config.model, config.parallel
    key = f"parallel.cp_comm_type={p.cp_comm_type}"
    if p.cp_comm_type == "p2p":
        return []
    heads = {
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_key_value_heads,
    }
    too_few = {name: count for name, count in heads.items() if count % (p.tensor * p.context)}
    if p.cp_comm_type != "a2a":
        others = "p2p" if p.context == 1 or too_few or config.shares_prompts else "p2p or a2a"
        # Transformer Engine 2.9 to 2.11 has `assert qkv_format != "thd"` in attn_forward_func_with_cp and
        # AttnFuncWithCPAndKVAllGather of pytorch/attention/dot_product_attention/context_parallel.py.
        return [
            f"{key} is not for packed rows: Transformer Engine 2.9 to 2.11 refuses them; set "
            f"parallel.cp_comm_type={others}"
        ]
    if p.context == 1:
        return [f"{key} needs parallel.context > 1, not 1; set parallel.cp_comm_type=p2p"]
    return [
        f"{key} divides the heads of a tensor-parallel rank over parallel.context={p.context} ranks, and "
        f"model.{name}={count} over parallel.tensor={p.tensor} is not a multiple of it; set "
        "parallel.cp_comm_type=p2p, or lower parallel.tensor or parallel.context"
        for name, count in too_few.items()
    ]


def _gather_errors(config: UncheckedConfig) -> list[str]:
    key, o, p = "optimizer.overlap_param_gather_with_optimizer_step", config.optimizer, config.parallel
    if not o.overlap_param_gather_with_optimizer_step:
        return []
    needs = {
        "optimizer.overlap=true": o.overlap,
        f"parallel.virtual_pipeline > 1, not {p.virtual_pipeline}": p.virtual_pipeline > 1,
    }
    return [f"{key}=true needs {text}; set {key}=false" for text, holds in needs.items() if not holds]


def _weight_errors(config: UncheckedConfig) -> list[str]:
    key, recipe = "precision.fp8_param_gather=true", config.precision.fp8
    if not config.precision.fp8_param_gather or recipe == "tensorwise":
        return []
    # Transformer Engine's `replace_raw_data` raises for mxfp8. The scales of `delayed` are histories of the
    # modules and not of the weights. `tests/transformer_engine/test_fp8_weights.py` has tensorwise alone.
    return [
        f"{key} needs precision.fp8=tensorwise, not {recipe or 'null'}; set it, or "
        "precision.fp8_param_gather=false"
    ]


def switch_machine_errors(
    config: UncheckedConfig, *, has_gpu: bool, has_transformer_engine: bool, version: str | None
) -> list[str]:
    """Every reason why a switch that is on cannot work on this machine. Empty if all can.

    version: Transformer Engine's version, or None if it is unknown.
    """
    if has_gpu and has_transformer_engine:
        if version is None:
            return []
        known = tuple(map(int, re.findall(r"\d+", version)[:2]))
        return [
            f"{key}={_text(value)} needs Transformer Engine {'.'.join(map(str, _SINCE[key][0]))} or newer "
            f"{_SINCE[key][1]}, and this is {version}; set {key}={_text(off)} or install it: "
            f"{install_command('cuda')}"
            for key, value, off in switches_on(config)
            if key in _SINCE and known < _SINCE[key][0]
        ]
    missing = "a GPU" if not has_gpu else f"Transformer Engine (install it: {install_command('cuda')})"
    return [
        f"{key}={_text(value)} needs {missing}; set {key}={_text(off)}"
        for key, value, off in switches_on(config)
    ]


def switches_on(config: UncheckedConfig) -> list[tuple[str, Any, Any]]:
    """(key, value, value when off) of each switch of Transformer Engine that is on."""
    found = []
    for key in _OF_TRANSFORMER_ENGINE:
        section_name, name = key.split(".")
        section = getattr(config, section_name)
        value, off = getattr(section, name), type(section).model_fields[name].default
        if value != off:
            found.append((key, value, off))
    return found


def _text(value: Any) -> str:
    """A value in the form of an override."""
    return str(value).lower() if isinstance(value, bool) else str(value)
