"""Finds settings that have no effect, and settings that contradict each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from megatron_post.config.sections import UncheckedConfig
from megatron_post.storage.reading import did_you_mean


@dataclass(frozen=True)
class Needs:
    """The condition under which `key`, a value or a section, has an effect.

    `other` must have one of `values`, or be above `above`, or, without these two, not be null. A `*` in `key`
    stands for every item of a list.
    """

    key: str
    other: str
    values: tuple[Any, ...] = ()
    above: float | None = None

    def holds(self, decides: Any) -> bool:
        """Whether `other` has a value with which `key` has an effect."""
        if self.above is not None:
            return bool(decides > self.above)
        return decides in self.values if self.values else decides is not None

    @property
    def remedy(self) -> str:
        if self.above is not None:
            return f"set {self.other} above {self.above:g}"
        wanted = " or ".join(map(_text, self.values))
        return f"set {self.other} to {wanted}" if self.values else f"give {self.other}"


# Neighbours in bf16 differ by 2^-7 of a power of 2. A moment times this decay falls by more than half of
# that, so it rounds to a smaller number. With a larger decay some moments round to themselves.
LARGEST_BF16_DECAY = 1 - 2**-8

# If several rows apply to a key, only the first one is reported.
NEEDS = (
    Needs("loss.trained_roles", "stage", ("sft",)),
    Needs("loss.impl", "stage", ("sft", "dpo", "pretrain")),
    Needs("reward.layout", "stage", ("reward",)),
    Needs("reward.head_lr_multiplier", "stage", ("reward", "step_reward")),
    Needs("dpo", "stage", ("dpo",)),
    Needs("dpo.label_smoothing", "dpo.loss", ("robust",)),
    Needs("dpo.margin", "dpo.loss", ("simpo",)),
    Needs("dpo.reference", "dpo.loss", ("sigmoid", "ipo", "hinge", "robust")),
    Needs("dpo.nll_normalization", "dpo.nll_weight", above=0),
    Needs("data.train_on", "stage", ("sft",)),
    Needs("data.sources.*.train_on", "stage", ("sft",)),
    Needs("data.eval_sources.*.train_on", "stage", ("sft",)),
    Needs("data.reasoning", "stage", ("sft", "reward", "step_reward", "dpo")),
    Needs("data.sources.*.templated", "stage", ("sft", "reward", "step_reward", "dpo")),
    Needs("data.eval_sources.*.templated", "stage", ("sft", "reward", "step_reward", "dpo")),
    Needs("data.preferences", "stage", ("reward", "dpo")),
    Needs("data.steps", "stage", ("step_reward",)),
    Needs("pretrain", "stage", ("pretrain",)),
    Needs("parallel.embedding_and_loss_as_layers", "parallel.pipeline", above=1),
    Needs("recompute.modules", "recompute.mode", ("selective",)),
    Needs("optimizer.min_lr", "optimizer.schedule", ("linear", "cosine")),
    Needs("train.max_skips", "train.on_not_finite", ("skip", "rollback")),
    Needs("checkpoint.keep_every", "checkpoint.every", above=0),
)


def without_effect(settings: BaseModel, needs: Sequence[Needs]) -> list[str]:
    """A line for every value that differs from its default and has no effect.

    Default values are not reported. The user may not have set them, since a checkpoint's config has every
    key.
    """
    found: dict[str, str] = {}
    for need in needs:
        decides = _at(settings, need.other)
        for key, value, default in () if need.holds(decides) else _changed(settings, need.key):
            found.setdefault(
                key,
                f"{key}={_text(value)} has no effect with {need.other}={_text(decides)}: {need.remedy}, or "
                f"leave {key} at {_text(default)}",
            )
    return list(found.values())


def contradictions(config: UncheckedConfig) -> list[str]:
    """A line for every pair of settings that contradict each other."""
    o, steps, found = config.optimizer, config.train.steps, []
    if o.min_lr > o.lr:
        found.append(f"optimizer.min_lr={o.min_lr:g} is above optimizer.lr={o.lr:g}; lower it")
    if o.warmup_steps > steps:
        found.append(
            f"optimizer.warmup_steps={o.warmup_steps} is longer than the run, train.steps={steps}; lower it"
        )
    for key in ("beta1", "beta2"):
        if o.moments == "bf16" and (decay := getattr(o, key)) > LARGEST_BF16_DECAY:
            found.append(
                f"optimizer.{key}={decay:g} is lost in bf16, in which a moment times {decay:g} can round to "
                f"itself, so that it never falls; set optimizer.{key} to at most "
                f"{LARGEST_BF16_DECAY}, or optimizer.moments=fp32"
            )
    if config.cuts_documents and config.data.overlong != "error":
        found.append(
            f"data.overlong={config.data.overlong} has no effect, because pretrain.documents=cut cuts every "
            "document that is longer than a pack; set pretrain.documents to whole, or leave out data.overlong"
        )
    found += [*_of_adapter(config), *_of_shared_prompts(config), *_of_prompts(config)]
    for key in ("sources", "eval_sources"):
        names = [source.name for source in getattr(config.data, key)]
        for number, name in enumerate(names):
            if (first := names.index(name)) < number:
                found.append(
                    f"data.{key}.{number}.name: {name!r} is also data.{key}.{first}'s; names must be unique"
                )
    return found


def _of_adapter(config: UncheckedConfig) -> list[str]:
    """A line for every setting that does not fit `adapter`, or its absence."""
    a, m, found = config.adapter, config.model, []
    if a is None:
        if config.stage == "dpo" and config.dpo.reference == "base":
            found.append("dpo.reference=base needs an adapter; set dpo.reference to store or frozen")
        return found
    smallest = min(m.hidden_size, m.num_key_value_heads * m.head_dim)
    if a.rank > smallest:
        found.append(
            f"adapter.rank={a.rank} is above {smallest}, the smallest side of an adapted matrix; lower it"
        )
    if a.kind == "dora" and a.dropout:
        found.append(
            f"adapter.dropout={a.dropout:g} is not supported with adapter.kind=dora: PEFT's definition "
            "multiplies the frozen weights a second time; set adapter.dropout=0"
        )
    if config.runs_reference and config.dpo.reference == "frozen":
        found.append(
            "dpo.reference=frozen keeps a second copy of the model, which the adapter's base already is; set "
            "dpo.reference=base"
        )
    for key in ("precision.fp8_param_gather", "optimizer.gradient_accumulation_fusion"):
        if _at(config, key):
            found.append(
                f"{key}=true has no effect with an adapter, whose base weights are frozen; set {key}=false"
            )
    return found


def _of_shared_prompts(config: UncheckedConfig) -> list[str]:
    """A line if DPO trains tokens of a prompt that both responses share."""
    roles = config.dpo.trained_roles
    if config.stage != "dpo" or not config.shares_prompts or {"header", "prompt"}.isdisjoint(roles):
        return []
    return [
        f"dpo.trained_roles={_text(roles)} trains tokens of the prompt, and dpo.layout=isolated has the "
        "prompt once for both responses; set dpo.layout=separate, or train body and terminator alone"
    ]


def _of_prompts(config: UncheckedConfig) -> list[str]:
    """A line for every entry of `data.prompted` that cannot be used."""
    data, found = config.data, []
    known = {source.name: source for source in (*data.sources, *data.eval_sources)}
    named = [entry.source for entry in data.prompted.sources]
    if named and config.stage != "sft":
        found.append(f"data.prompted.sources has no effect with stage={config.stage}; set stage to sft")
    for number, name in enumerate(named):
        key, source = f"data.prompted.sources.{number}.source", known.get(name)
        if source is None:
            meant = did_you_mean(name, list(known))
            found.append(f"{key}: {name!r} is in neither data.sources nor data.eval_sources{meant}")
        elif source.columns or source.format != "auto":
            found.append(f"{key}: templates read the rows of {name!r}, so leave out its format and columns")
        if (first := named.index(name)) < number:
            found.append(f"{key}: {name!r} is also data.prompted.sources.{first}'s; write one entry for it")
    tasks = [entry.task for entry in data.prompted.sources]
    for task in data.prompted.held_out_tasks:
        if task not in tasks:
            meant = did_you_mean(task, tasks)
            found.append(f"data.prompted.held_out_tasks: no source has the task {task!r}{meant}")
    return found


def _at(settings: BaseModel, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _changed(settings: BaseModel, key: str, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value, default) of every value under `key` that differs from its default.

    above: the key of `settings` itself, with a dot.
    """
    name, _, rest = key.partition(".")
    here, value = f"{above}{name}", getattr(settings, name)
    default = type(settings).model_fields[name].get_default(call_default_factory=True)
    if rest.startswith("*."):
        for number, item in enumerate(value):
            yield from _changed(item, rest[2:], f"{here}.{number}.")
    elif isinstance(value, BaseModel):
        for inner in [rest] if rest else type(value).model_fields:
            yield from _changed(value, inner, f"{here}.")
    elif value != default:
        yield here, value, default


def _text(value: Any) -> str:
    """A value in the form of an override."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return f"{{{', '.join(f'{key}: {_text(each)}' for key, each in changed.items())}}}"
    return f"{value}"
