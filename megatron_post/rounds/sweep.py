"""The section `stages.sweep` of a round: variants of a training stage, whose models are averaged."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from megatron_post.config.section import Line, Name, Positive, Section

# The round sets these, or computes the ranks of its steps and the reference of DPO from the stage's file.
_OF_THE_ROUND = (
    *(
        "stage",
        "run_dir",
        "model",
        "tokenizer",
        "parallel",
        "precision",
        "dpo.loss",
        "dpo.reference",
        "dpo.trained_roles",
    ),
    *("data.store", "data.sources", "data.eval_sources", "data.pack_length", "train.export_hf"),
)


# A store is packed for one of their values.
_LAYOUTS = ("reward.layout", "dpo.layout")
SELECTED = "selected"  # in a mix, the rows that the rounds have selected


class Variant(Section):
    """One training run of a sweep."""

    set: dict[Line, Any] = Field(
        default_factory=dict, description="key -> value that differs from the stage's file, as optimizer.lr"
    )
    mix: dict[Name, Positive] = Field(
        default_factory=dict,
        description="for SFT: share of each source of data.sft in the mixture, and of the `selected` rows, "
        "relative to the others. none: the mixture of the round",
    )
    weight: Positive = Field(1.0, description="weight of its model in the average, relative to the others")

    @property
    def packs_alone(self) -> bool:
        """Whether it needs a store of its own."""
        return bool(self.mix) or any(key.startswith("data.") or key in _LAYOUTS for key in self.set)


class Sweep(Section):
    """The variants of each stage. A stage without variants is trained once."""

    reward: tuple[Variant, ...] = Field((), description="variants of the reward model")
    sft: tuple[Variant, ...] = Field((), description="variants of supervised fine-tuning")
    dpo: tuple[Variant, ...] = Field((), description="variants of direct preference optimisation")

    @model_validator(mode="after")
    def _can_be_averaged(self) -> "Sweep":
        errors = []
        for stage in type(self).model_fields:
            variants: tuple[Variant, ...] = getattr(self, stage)
            if len(variants) == 1:
                errors.append(f"{stage} has one variant; give two or more, which are averaged")
            for number, variant in enumerate(variants):
                key = f"{stage}.{number}"
                errors += [
                    f"{key}.set: {name} is the same for all variants; set it in the stage's file"
                    if name.startswith(("parallel", "precision", "dpo.", "data.pack_length"))
                    else f"{key}.set: the round sets {name}"
                    for name in variant.set
                    if any(name == own or name.startswith(f"{own}.") for own in _OF_THE_ROUND)
                ]
                if variant.mix and stage != "sft":
                    errors.append(f"{key}.mix has no effect, because {stage} has no sources of data.sft")
                same = [n for n, other in enumerate(variants[:number]) if _trains_the_same(other, variant)]
                errors += [f"{key} trains what variant {same[0]} trains; change it"] if same else []
        if errors:
            raise ValueError("\n".join(errors))
        return self


def mixed(sources: list[dict[str, Any]], mix: Mapping[str, float], *, selected: int) -> list[dict[str, Any]]:
    """The sources of a mixture with their shares. The first `selected` sources are selected rows."""
    if not mix:
        return sources
    shares = [mix.get(SELECTED, 0.0) / selected] * selected
    shares += [mix.get(source["name"], 0.0) for source in sources[selected:]]
    pairs = zip(sources, shares, strict=True)
    return [{**source, "weight": share, "epochs": None} for source, share in pairs if share]


def _trains_the_same(a: Variant, b: Variant) -> bool:
    return (a.set, a.mix) == (b.set, b.mix)
