"""Which fused parts a run on this machine has, and what each missing one costs."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_post.config.fp8 import RECIPES, refusal
from megatron_post.doctor.probes import is_found, value_or
from megatron_post.installation import install_command

ApexKind = Literal["absent", "nvidia", "nvidia without CUDA extensions", "unrelated"]


@dataclass(frozen=True)
class Part:
    """A fused part with its state, the effect on a run on this machine, and the command that installs it."""

    name: str
    state: Literal["active", "missing", "not needed"]
    meaning: str
    remedy: str = ""


def fused_parts(*, has_gpu: bool, core_loads: bool = True) -> list[Part]:
    """Transformer Engine, Apex's FusedAdam and Triton on this machine. core_loads: whether megatron-core can
    be imported beside them."""
    engine = is_found("transformer_engine")
    return [_engine(engine, has_gpu, core_loads), _fused_adam(engine, has_gpu), _triton(has_gpu)]


def _engine(found: bool, has_gpu: bool, core_loads: bool) -> Part:
    if found and has_gpu and not core_loads:
        meaning = "installed, but megatron-core cannot be imported beside it; see the problem below"
        return Part("Transformer Engine", "missing", meaning)
    cost = (
        "the portable layers run instead: unfused norms, activations and rotary embedding, FlexAttention "
        "(compiled when a run starts), keys and values gathered over context-parallel ranks; precision.fp8 "
        "and recompute.modules with layernorm are refused"
    )
    return _part(
        "Transformer Engine",
        found=found,
        has_gpu=has_gpu,
        active="fused norms, linears, rotary embedding and packed attention; " + value_or("", _fp8_recipes),
        cost=cost,
        remedy=install_command("cuda"),
    )


def _fp8_recipes() -> str:
    """The values of `precision.fp8` that this GPU supports, and the requirements of the others."""
    import torch

    capability = torch.cuda.get_device_capability()
    found = {name: refusal(name, capability=capability, cuda=torch.version.cuda) for name in RECIPES}
    possible = ", ".join(name for name, reason in found.items() if reason is None) or "nothing but null"
    others = "".join(f"; {name} needs {reason}" for name, reason in found.items() if reason is not None)
    return f"precision.fp8 can be {possible}{others}"


def apex_kind() -> ApexKind:
    """Which `apex` is importable, without importing it.

    NVIDIA's has `apex/optimizers/fused_adam.py` and, if built with them, CUDA extensions in module `amp_C`.
    The `apex` on PyPI (0.9.x) is an unrelated toolkit for the Pyramid web framework.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "unrelated"
    return "nvidia" if importlib.util.find_spec("amp_C") else "nvidia without CUDA extensions"


def _fused_adam(engine: bool, has_gpu: bool) -> Part:
    name, kind = "NVIDIA Apex FusedAdam", value_or("absent", apex_kind)
    if engine:
        return Part(name, "not needed", "Transformer Engine's own FusedAdam is taken first")
    which = {"unrelated": " (the apex installed is not NVIDIA's)", "absent": ""}.get(kind, f" (apex: {kind})")
    cost = (
        f"Adam is torch's fused kernel with Apex's interface{which}: the same update, and a run resumes. Its "
        "speed beside Apex's is not measured. Transformer Engine brings its own"
    )
    active = "one fused kernel updates all parameters"
    return _part(name, found=kind == "nvidia", has_gpu=has_gpu, active=active, cost=cost)


def _triton(has_gpu: bool) -> Part:
    cost = (
        "torch.compile cannot build GPU kernels: FlexAttention, and with it the portable layers, cannot run "
        "on a GPU"
    )
    active = "torch.compile and FlexAttention can build their kernels"
    return _part(
        "Triton",
        found=is_found("triton"),
        has_gpu=has_gpu,
        active=active,
        cost=cost,
        remedy="pip install triton",
    )


def _part(name: str, *, found: bool, has_gpu: bool, active: str, cost: str, remedy: str = "") -> Part:
    if has_gpu:
        return Part(name, "active", active) if found else Part(name, "missing", cost, remedy)
    meaning = "installed, but it runs on GPUs alone" if found else f"no GPU here. On one without it, {cost}"
    return Part(name, "not needed", meaning)
