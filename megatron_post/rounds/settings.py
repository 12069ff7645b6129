"""The YAML of `megatron-post round`."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from megatron_post.config.consistency import Needs, without_effect
from megatron_post.config.data import Data, Source
from megatron_post.config.load import load_section
from megatron_post.config.losses import DPO
from megatron_post.config.rewards import TRAINED, Reward, list_errors, models_of
from megatron_post.config.section import Count, Line, Name, Positive, Section, Whole
from megatron_post.config.sections import Parallel, Precision
from megatron_post.config.stages import StageName
from megatron_post.inference.settings import (
    PART,
    BackendSettings,
    SamplesPerPrompt,
    ServerBackend,
    TransformersBackend,
)
from megatron_post.rounds.annotation.settings import Annotation
from megatron_post.rounds.merge_settings import Method
from megatron_post.rounds.select_settings import SELECTION_NEEDS, Selection
from megatron_post.rounds.sweep import SELECTED, Sweep
from megatron_post.storage.reading import did_you_mean

_NEEDS = (
    Needs("generate.collected_samples", "start.preferences", ((),)),
    Needs("generate.collected_samples", "start.reward", (None,)),
    Needs("generate.collected_samples", "annotate", (None,)),
    Needs("start.previous", "generate.previous_samples", above=0),
    Needs("generate.by_capability", "data.validation"),
    Needs("stages.sft_steps_a_round", "start.base"),
    Needs("average.density", "average.method", ("ties", "dare_ties")),
    *(Needs(f"select.{need.key}", f"select.{need.other}") for need in SELECTION_NEEDS),
)


class Start(Section):
    """The inputs of the first round. All paths of models are Hugging Face directories."""

    policy: Name = Field(description="model that answers the first round's prompts")
    policies: dict[Line, Name] = Field(
        default_factory=dict,
        description="models that answer the first round's prompts of a capability in place of `policy`, such "
        "as an expert for code",
    )
    previous: Name | None = Field(
        None, description="model whose responses are compared with the policy's in the first round"
    )
    base: Name | None = Field(
        None,
        description="reward model and SFT of every round start from it, and SFT uses the rows of all rounds. "
        "null: they start from the round's policy, and SFT uses the rows of this round",
    )
    reward: Name | None = Field(
        None, description="a reward model for all rounds. null: each round trains one"
    )
    preferences: tuple[Name, ...] = Field(
        (),
        description="earlier batches of preferences. none: people or the verifier make the first ones of the "
        "policy's answers",
    )


class Phase(Section):
    """The data of the rounds from one round on, until the next phase begins."""

    from_round: Count = Field(description="the first round of this phase")
    prompts: Name | None = Field(
        None, description="prompts whose responses are trained on. null: data.prompts"
    )
    mix: dict[Name, Positive] = Field(
        default_factory=dict,
        description="for SFT: share of sources of data.sft, and of the `selected` rows, relative to the "
        "others. Sources that it does not name are not used. none: all sources as they are",
    )


class RoundData(Section):
    """The data of a round. Prompts are files in the format of `generate`."""

    prompts: Name = Field(description="prompts whose responses are trained on")
    prompts_per_round: Count | None = Field(
        None,
        description="number of prompts that a round takes next, from the start again at the end. null: all",
    )
    validation: Name | None = Field(
        None, description="prompts for choosing the best checkpoint. null: the average is chosen"
    )
    held_out: Name = Field(description="prompts for the accuracies in the report")
    sft: tuple[Source, ...] = Field((), description="sources that are mixed with the selected responses")
    curriculum: tuple[Phase, ...] = Field(
        (),
        description="other prompts and another mixture for SFT from a round on, in the order of the rounds",
    )
    max_bad_rows: Whole = Field(
        0, description="bad rows of each file that are left out. With more of them a step fails"
    )


class RoundGenerate(Section):
    """How a round's policy answers prompts."""

    sampling: SamplesPerPrompt = SamplesPerPrompt()
    collected_samples: Count = Field(
        4, description="responses per prompt for the first reward model, if there are no earlier preferences"
    )
    previous_samples: Whole = Field(
        0,
        description="responses per prompt of the previous round's policy, for preferences between models",
    )
    system: dict[str, str] = Field(
        default_factory=dict, description="system prompt of each capability, as in `generate`"
    )
    by_capability: bool = Field(
        False,
        description="the prompts of each capability are answered by the previous round's best model for it, "
        "by data.validation. false: one model answers all",
    )
    max_failed: float = Field(0.01, ge=0, le=1, description="as in `generate`. Failed prompts count as wrong")
    backend: BackendSettings = TransformersBackend()
    part: Count = Field(32, description=PART)
    copies: Count = Field(
        1,
        description="copies of the model that generate in parallel, each on its backend's GPUs. A chain uses "
        "as many nodes as they need, and one process as many copies as fit on its node",
    )


class Stages(Section):
    """Configs of the training runs. The round sets run_dir, model, tokenizer and data in them."""

    trained: ClassVar[tuple[StageName, ...]] = ("reward", "sft", "dpo")

    reward: Name = Field(description="config of the reward model's training")
    sft: Name = Field(description="config of supervised fine-tuning")
    dpo: Name = Field(description="config of direct preference optimisation")
    sft_steps_a_round: bool = Field(
        False,
        description="the steps in the SFT file are for one round's rows. If SFT uses the rows of n rounds, "
        "from start.base, it runs n times as many",
    )
    sweep: Sweep = Field(Sweep(), description="variants of the stages, whose models are averaged")


class StageData(Section):
    """The section `data` of a `StageFile`."""

    model_config = ConfigDict(extra="ignore")

    pack_length: Count = Data.model_fields["pack_length"].default


class StageFile(Section):
    """The keys of a stage's config that are used before the round has completed it.

    Other keys are checked with the whole config.
    """

    model_config = ConfigDict(extra="ignore")

    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    dpo: DPO = DPO()
    data: StageData = StageData()


class Average(Section):
    """How the models of a round are averaged, which are policy (the one that answered), sft and dpo."""

    method: Method = Field("linear", description="method of the merge, as in `merge`")
    weights: dict[Literal["policy", "sft", "dpo"], Positive] = Field(
        min_length=2, description="weight of each model, relative to the others"
    )
    density: float = Field(1.0, gt=0, le=1, description="for ties and dare_ties, the share of deltas to keep")


class RoundSettings(Section):
    """A round file."""

    run_dir: Name = Field(description="models, responses and reports of all rounds")
    rounds: Count = Field(
        1, description="number of rounds. Each starts from the model that the previous one chose"
    )
    seed: Whole = Field(0, description="seed of the responses, the training runs and the average")
    start: Start
    data: RoundData
    generate: RoundGenerate = RoundGenerate()
    annotate: Annotation | None = Field(
        None,
        description="people compare responses of each round, and DPO uses what they prefer. null: nobody "
        "does, and DPO uses the pairs of `select`",
    )
    select: Selection = Selection()
    curate: Name | None = Field(
        None,
        description="file of `curate`, whose steps choose among the selected rows before SFT. The round sets "
        "its `run`, and its only source is `selected`. null: SFT uses all selected rows",
    )
    reward: tuple[Reward, ...] = Field(
        (),
        description="rewards whose weighted sum ranks the responses, as in `select`. none: the reward model "
        "that the round trains, or start.reward",
    )
    stages: Stages
    ranks: Count | None = Field(
        None,
        description="ranks of steps that train, score or compute a reference. null: one copy of the model",
    )
    ranks_per_node: Count = Field(
        8, description="ranks per node in a chain's jobs. More ranks use several nodes"
    )
    average: Average

    @property
    def trains_reward(self) -> bool:
        """Whether each round trains a reward model."""
        return self.start.reward is None and (not self.reward or TRAINED in models_of(self.reward))

    def phase(self, number: int) -> Phase:
        """The part of the curriculum that a round belongs to."""
        begun = [phase for phase in self.data.curriculum if phase.from_round <= number]
        return begun[-1] if begun else Phase(from_round=1)

    def _curriculum_errors(self) -> list[str]:
        """A line for each error in the curriculum."""
        phases, errors = self.data.curriculum, []
        known = {SELECTED, *(source.name for source in self.data.sft)}
        for number, phase in enumerate(phases):
            key = f"data.curriculum.{number}"
            if number and phase.from_round <= phases[number - 1].from_round:
                errors.append(f"{key}.from_round={phase.from_round} is not after the phase before it")
            errors += [
                f"{key}.mix: {name!r} is neither a source of data.sft nor `{SELECTED}`"
                f"{did_you_mean(name, sorted(known))}"
                for name in phase.mix
                if name not in known
            ]
        if any(phase.mix for phase in phases) and any(v.mix for v in self.stages.sweep.sft):
            errors.append(
                "stages.sweep.sft: a mix of a variant contradicts that of data.curriculum; leave one out"
            )
        return errors

    @model_validator(mode="after")
    def _can_begin(self) -> "RoundSettings":
        errors = without_effect(self, _NEEDS) + list_errors(self.reward)
        if self.start.reward is not None and self.reward:
            errors.append("start.reward has no effect with a list `reward`; name it there, among `models`")
        collects = self.generate.collected_samples != RoundGenerate.model_fields["collected_samples"].default
        for key, is_set in (
            ("generate.collected_samples", collects),
            ("start.preferences", self.start.preferences),
        ):
            if is_set and self.reward and not self.trains_reward:
                errors.append(f"{key} has no effect, because no entry of `reward` names {TRAINED!r}")
        errors += [
            f"reward {reward.name!r}: the round trains a reward model of responses, which has no of_steps"
            for reward in self.reward
            if reward.of_steps and TRAINED in reward.models
        ]
        if isinstance(self.generate.backend, ServerBackend):
            errors.append(
                "generate.backend: a server has one model, and a round needs several; choose "
                "transformers or vllm, or run `megatron-post generate` with the server"
            )
        if "seed" in self.generate.sampling.model_fields_set:
            errors.append("generate.sampling.seed: a round uses its own `seed`; set that")
        errors += self._curriculum_errors()
        wanted = {SELECTED, *(source.name for source in self.data.sft)}
        errors += [
            f"stages.sweep.sft.{number}.mix names {', '.join(variant.mix)}; it must name all of "
            f"{', '.join(sorted(wanted))}"
            for number, variant in enumerate(self.stages.sweep.sft)
            if variant.mix and variant.mix.keys() != wanted
        ]
        if self.select.verifier is None:
            known = self.start.preferences or self.annotate
            if self.trains_reward and not known:
                errors.append(
                    "the first reward model has no data: give start.preferences, start.reward, annotate or a "
                    "select.verifier"
                )
            if self.data.validation is not None:
                errors.append("data.validation needs a select.verifier, which finds the best checkpoint")
        if errors:
            raise ValueError("\n".join(errors))
        return self


def load_round(path: str | Path, overrides: Sequence[str] = ()) -> RoundSettings:
    """Read a round file and dotted overrides. Raises `ConfigError` with every error at once."""
    return load_section(RoundSettings, path, overrides)
