"""The YAML of `megatron-post round`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.data import Data, Source
from megatron_post.config.load import load_section
from megatron_post.config.section import Count, Name, Positive, Section, Whole
from megatron_post.config.sections import DPO, Parallel, Precision
from megatron_post.inference.settings import (
    PART,
    BackendSettings,
    SamplesPerPrompt,
    ServerBackend,
    TransformersBackend,
)
from megatron_post.rounds.merge_settings import Method
from megatron_post.rounds.select_settings import SELECTION_NEEDS, Selection

_NEEDS = (
    Needs("generate.collected_samples", "start.preferences", ((),)),
    Needs("generate.collected_samples", "start.reward", (None,)),
    Needs("stages.sft_steps_a_round", "start.base"),
    Needs("average.density", "average.method", ("ties", "dare_ties")),
    *(Needs(f"select.{need.key}", f"select.{need.other}") for need in SELECTION_NEEDS),
)


class Start(Section):
    """What the first round begins with. All paths of models are Hugging Face directories."""

    policy: Name = Field(description="answers the first round's prompts")
    base: Name | None = Field(
        None,
        description="reward model and SFT of every round start from it, SFT on what all rounds selected; "
        "null: from the round's policy, SFT on this round's",
    )
    reward: Name | None = Field(
        None, description="a reward model for all rounds; null: one a round is trained"
    )
    preferences: tuple[Name, ...] = Field(
        (), description="earlier batches of preferences; none: the verifier's, on the policy's answers"
    )


class RoundData(Section):
    """What a round asks, trains on and is measured with. Prompts are files as `generate` reads them."""

    prompts: Name = Field(description="prompts whose responses are trained on")
    prompts_per_round: Count | None = Field(
        None, description="a round takes the next so many, and begins anew at the end; null: all of them"
    )
    validation: Name | None = Field(
        None, description="prompts that choose the best checkpoint; null: the average is it"
    )
    held_out: Name = Field(description="prompts that the accuracies in the report are measured on")
    sft: tuple[Source, ...] = Field((), description="mixed with the selected responses")
    max_bad_rows: Whole = Field(
        0, description="rows of each file that may be refused, and are left out, before a step ends"
    )


class RoundGenerate(Section):
    """How a round's policy answers prompts."""

    sampling: SamplesPerPrompt = SamplesPerPrompt()
    collected_samples: Count = Field(
        4, description="responses a prompt for the first reward model, where there are no earlier preferences"
    )
    previous_samples: Whole = Field(
        0,
        description="responses a prompt from the round before's policy, for preferences between models",
    )
    system: dict[str, str] = Field(
        default_factory=dict, description="capability -> system prompt, as in `generate`"
    )
    max_failed: float = Field(0.01, ge=0, le=1, description="as in `generate`; what failed counts as wrong")
    backend: BackendSettings = TransformersBackend()
    part: Count = Field(32, description=PART)
    copies: Count = Field(
        1,
        description="of the model, each on its backend's GPUs, that draw side by side: in a chain on as many "
        "nodes as they fill, else as many as one node holds",
    )


class Stages(Section):
    """Configs of the training runs; the round sets run_dir, model, tokenizer and data in them."""

    reward: Name = Field(description="config of the reward model's training")
    sft: Name = Field(description="config of supervised fine-tuning")
    dpo: Name = Field(description="config of direct preference optimisation")
    sft_steps_a_round: bool = Field(
        False,
        description="the SFT file's steps are for one round's rows: where SFT reads those of n rounds, from "
        "start.base, it takes n times as many",
    )


class StageData(Section):
    """As `StageFile`."""

    model_config = ConfigDict(extra="ignore")

    pack_length: Count = Data.model_fields["pack_length"].default


class StageFile(Section):
    """What a stage's config says of its layout, before the round has completed it. Its other keys are checked
    with the whole config."""

    model_config = ConfigDict(extra="ignore")

    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    dpo: DPO = DPO()
    data: StageData = StageData()


class Average(Section):
    """What becomes of the models of a round: policy (the one that answered), sft, dpo."""

    method: Method = Field("linear", description="how they are merged, as in `merge`")
    weights: dict[Literal["policy", "sft", "dpo"], Positive] = Field(
        min_length=2, description="model -> weight, relative to the others'"
    )
    density: float = Field(1.0, gt=0, le=1, description="ties, dare_ties: share of the deltas that is kept")


class RoundSettings(Section):
    """A round file."""

    run_dir: Name = Field(description="models, responses and reports of all rounds")
    rounds: Count = Field(1, description="rounds to run, each from the model that the one before ended with")
    seed: Whole = Field(0, description="of the responses, the training runs and the average")
    start: Start
    data: RoundData
    generate: RoundGenerate = RoundGenerate()
    select: Selection = Selection()
    stages: Stages
    ranks: Count | None = Field(
        None, description="of steps that train, score or ask DPO's reference; null: one copy of the model"
    )
    ranks_per_node: Count = Field(8, description="of a chain's jobs; more ranks take several nodes")
    average: Average

    @model_validator(mode="after")
    def _can_begin(self) -> "RoundSettings":
        errors = without_effect(self, _NEEDS)
        if isinstance(self.generate.backend, ServerBackend):
            errors.append(
                "generate.backend: a server answers with one model, and a round asks several; choose "
                "transformers or vllm, or run `megatron-post generate` with the server"
            )
        if "seed" in self.generate.sampling.model_fields_set:
            errors.append("generate.sampling.seed: a round draws by its own `seed`; set that")
        if self.select.verifier is None:
            if not self.start.preferences and self.start.reward is None:
                errors.append(
                    "the first reward model has no data: give start.preferences, start.reward or a "
                    "select.verifier"
                )
            if self.data.validation is not None:
                errors.append("data.validation needs a select.verifier that tells which checkpoint is best")
        if errors:
            raise ValueError("\n".join(errors))
        return self


def load_round(path: str | Path, overrides: Sequence[str] = ()) -> RoundSettings:
    """Read a round file and dotted overrides. Raises `ConfigError` with every error at once."""
    return load_section(RoundSettings, path, overrides)
