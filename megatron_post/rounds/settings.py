"""The YAML of `megatron-post round`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_post.config.load import completed, parse, read_tree
from megatron_post.config.schema import Section, Source
from megatron_post.rounds.backends import BackendSettings, Sampling, ServerBackend, TransformersBackend
from megatron_post.rounds.merge import Method
from megatron_post.rounds.select import Selection

StageName = Literal["reward", "sft", "dpo"]


class Start(Section):
    """What the first round begins with. All paths of models are Hugging Face directories."""

    policy: str = Field(description="answers the first round's prompts")
    base: str | None = Field(
        None,
        description="reward model and SFT of every round start from it, SFT on what all rounds selected; "
        "null: from the round's policy, SFT on this round's",
    )
    reward: str | None = Field(
        None, description="a reward model for all rounds; null: one a round is trained"
    )
    preferences: tuple[str, ...] = Field(
        (), description="earlier batches of preferences; none: the verifier's, on the policy's answers"
    )


class RoundData(Section):
    """prompts, validation, held_out: files of prompts, as `generate` reads them."""

    prompts: str
    prompts_per_round: PositiveInt | None = Field(
        None, description="a round takes the next so many, and begins anew at the end; null: all of them"
    )
    validation: str | None = Field(None, description="chooses the best checkpoint; null: the average is it")
    held_out: str = Field(description="what the report's accuracies are about")
    sft: tuple[Source, ...] = Field((), description="mixed with the selected responses")
    max_bad_rows: int = Field(0, ge=0)


class RoundGenerate(Section):
    sampling: Sampling = Sampling()
    collected_samples: PositiveInt = Field(
        4, description="responses a prompt for the first reward model, where there are no earlier preferences"
    )
    previous_samples: int = Field(
        0,
        ge=0,
        description="responses a prompt from the round before's policy, for preferences between models",
    )
    system: dict[str, str] = Field(default_factory=dict)
    max_failed: float = Field(0.01, ge=0, le=1, description="as in `generate`; what failed counts as wrong")
    backend: BackendSettings = TransformersBackend()
    part: PositiveInt = 32
    copies: PositiveInt = Field(
        1,
        description="of the model, each on its backend's GPUs, that draw side by side: in a chain on as many "
        "nodes as they fill, else as many as one node holds",
    )


class Stages(Section):
    """Configs of the training runs; the round sets run_dir, model, tokenizer and data in them."""

    reward: str
    sft: str
    dpo: str
    sft_steps_a_round: bool = Field(
        False,
        description="the SFT file's steps are for one round's rows: where SFT reads those of n rounds, from "
        "start.base, it takes n times as many",
    )


class Average(Section):
    """What becomes of the models of a round: policy (the one that answered), sft, dpo."""

    method: Method = "linear"
    weights: dict[Literal["policy", "sft", "dpo"], PositiveFloat] = Field(min_length=2)
    density: float = Field(1.0, gt=0, le=1)


class RoundSettings(Section):
    """A round file."""

    run_dir: str
    rounds: PositiveInt = 1
    seed: int = Field(0, ge=0)
    start: Start
    data: RoundData
    generate: RoundGenerate = RoundGenerate()
    select: Selection = Selection()
    stages: Stages
    ranks: PositiveInt | None = Field(
        None, description="of steps that train, score or ask DPO's reference; null: one copy of the model"
    )
    ranks_per_node: PositiveInt = Field(8, description="of a chain's jobs; more ranks take several nodes")
    average: Average

    @model_validator(mode="after")
    def _can_begin(self) -> "RoundSettings":
        errors = []
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
    return parse(RoundSettings, completed(read_tree(path), overrides, origin=str(path)), origin=str(path))
