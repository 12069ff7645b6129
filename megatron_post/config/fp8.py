"""The requirements of each FP8 recipe for the model's widths, the GPU and CUDA.

Transformer Engine checks the same requirements, but only when the first layer runs on the nodes.
tests/transformer_engine/test_fp8.py compares its checks with these.
"""

from dataclasses import dataclass

from megatron_post.config.sections import Recompute, UncheckedConfig

Version = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """The requirements of one recipe.

    multiple: both dimensions of every matrix that a rank multiplies must be multiples of it.
    capability, before: GPUs from the first compute capability to below the second support the recipe.
    cuda: the oldest CUDA version that supports it, if torch 2.13 can be built for an older one.
    """

    multiple: int
    capability: Version
    before: Version | None = None
    cuda: Version | None = None


RECIPES = {
    "delayed": Recipe(16, (8, 9)),
    "tensorwise": Recipe(16, (8, 9)),
    "blockwise": Recipe(128, (9, 0), cuda=(12, 9)),
    "mxfp8": Recipe(32, (10, 0), before=(12, 0)),
}


def multiple_of(recipe: str | None) -> int:
    """The multiple that FP8 requires of a matrix's rows, or 1 without FP8."""
    return 1 if recipe is None else RECIPES[recipe].multiple


def setting_errors(config: UncheckedConfig) -> list[str]:
    """A line for every setting with which the FP8 recipe cannot run on any GPU. Empty without FP8."""
    recipe, r = config.precision.fp8, config.recompute
    if recipe is None:
        return []
    errors = _width_errors(config, recipe)
    if config.precision.dtype != "bf16":
        errors.append(
            f"precision.fp8={recipe} needs precision.dtype=bf16, not {config.precision.dtype}; "
            "set precision.dtype=bf16 or precision.fp8=null"
        )
    if recipe == "delayed" and r.mode == "selective" and "layernorm" in r.modules:
        # A delayed recipe updates its scales in every forward pass. So a recomputed norm would use other
        # scales than in the first forward pass.
        errors.append(
            "precision.fp8=delayed cannot recompute norms (recompute.modules has layernorm); "
            f"set precision.fp8=tensorwise, or set {without_norms(r)}"
        )
    return errors


def without_norms(recompute: Recompute) -> str:
    """The settings that recompute everything else that `recompute` does, for a message."""
    others = ",".join(module for module in recompute.modules if module != "layernorm")
    if others:
        return f"recompute.modules=[{others}]"
    # modules have no effect with this mode, and are refused unless they are the default
    return "recompute.mode=none and recompute.modules=[core_attn]"


def _width_errors(config: UncheckedConfig, recipe: str) -> list[str]:
    m, tensor = config.model, config.parallel.tensor
    multiple = RECIPES[recipe].multiple
    widths = {
        f"model.hidden_size={m.hidden_size}": m.hidden_size,
        f"model.ffn_hidden_size={m.ffn_hidden_size}": m.ffn_hidden_size,
        f"model.num_key_value_heads={m.num_key_value_heads} (queries, keys and values together)": m.head_dim
        * (m.num_attention_heads + 2 * m.num_key_value_heads),
    }
    errors = []
    smallest = RECIPES["tensorwise"].multiple
    remedy = "null" if any(width // tensor % smallest for width in widths.values()) else "tensorwise"
    for name, width in widths.items():
        share, rest = divmod(width, tensor)
        if rest or share % multiple == 0:  # layout_errors reports a remainder
            continue
        fewer = " or lower parallel.tensor" if width % multiple == 0 else ""
        errors.append(
            f"precision.fp8={recipe} needs matrices whose widths on a rank are multiples of {multiple}, and "
            f"{name} gives {share} with parallel.tensor={tensor}; set precision.fp8={remedy}{fewer}"
        )
    return errors


def device_errors(config: UncheckedConfig, *, capability: Version | None, cuda: str | None) -> list[str]:
    """The reasons why this GPU or torch's CUDA version cannot run the config's FP8 recipe.

    capability: the GPU's compute capability. cuda: the CUDA version that torch is built for. None: unknown.
    """
    recipe = config.precision.fp8
    reason = None if recipe is None else refusal(recipe, capability=capability, cuda=cuda)
    if reason is None:
        return []
    remedy = "null" if refusal("tensorwise", capability=capability, cuda=cuda) else "tensorwise"
    return [f"precision.fp8={recipe} needs {reason}; set precision.fp8={remedy}"]


def refusal(recipe: str, *, capability: Version | None, cuda: str | None) -> str | None:
    """The requirement of the recipe that is not met, or None. Unknown values count as sufficient."""
    needed = RECIPES[recipe]
    if capability is not None:
        low, high = needed.capability, needed.before
        if capability < low or (high is not None and capability >= high):
            bounds = f"{_text(low)} or higher" + (f" and below {_text(high)}" if high else "")
            return f"GPUs of compute capability {bounds}, and these have {_text(capability)}"
    if cuda is not None and needed.cuda is not None and _version(cuda) < needed.cuda:
        return f"CUDA {_text(needed.cuda)} or newer, and this torch is built for {cuda}"
    return None


def _version(text: str) -> Version:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _text(version: Version) -> str:
    return ".".join(map(str, version))
