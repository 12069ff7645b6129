"""The whole configuration as frozen pydantic models. Unknown keys are errors; defaults are Llama 3's where it
has one."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from megatron_post.config.layout import layout_errors
from megatron_post.config.presets import PRESETS

RoleName = Literal["header", "prompt", "body", "terminator"]
Rating = Literal["significantly_better", "better", "slightly_better", "marginally_better"]
TrainOn = Literal["all_turns", "last_turn"]
Reasoning = Literal["refuse", "drop", "render"]


class Section(BaseModel):
    """One section of the YAML: immutable, and a misspelt key is an error."""

    # pydantic's own message would print a key that stands in the wrong place; ConfigError hides it
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


class RopeScaling(Section):
    """Llama 3.1's frequency scaling, with Hugging Face's names."""

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192


class Model(Section):
    """Shape of the Llama, by preset or by number (a number given beside a preset overrides it)."""

    preset: str | None = None
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat
    tie_word_embeddings: bool
    initializer_range: PositiveFloat = 0.02
    init_from: str | None = Field(
        None, description="Hugging Face directory to start from; null: random from seed"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        name = values["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Tokenizer(Section):
    path: str = Field(
        description="Meta's tokenizer.model, a tokenizer.json, or a directory that holds one of them"
    )
    content_tokens: tuple[str, ...] = Field(
        (),
        description="special tokens of the user's own, such as <think>, that texts may spell; what spells "
        "another special token is encoded as text",
    )


class Source(Section):
    """One dataset: a local file or directory, or a hub name, read through `datasets`."""

    name: str
    path: str
    split: str = "train"
    subset: str | None = None
    format: Literal["auto", "messages", "preference", "columns", "transcript"] = "auto"
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="role -> column, for rows that hold one column a role; or {messages: column}",
    )
    epochs: float | None = Field(None, gt=0, description="how often each row is used; exclusive with weight")
    weight: PositiveFloat | None = Field(
        None, description="share of the mixture's rows, relative to other weights"
    )
    max_rows: PositiveInt | None = None
    train_on: TrainOn | None = Field(None, description="null: as data.train_on")
    templated: Literal["refuse", "keep"] = Field(
        "refuse", description="texts that hold the marks of a chat template or a transcript"
    )
    ignore: tuple[str, ...] = Field(
        (), description="keys of rows and messages that are passed over: neither used, refused nor listed"
    )
    batch: int = Field(0, description="number of the preference batch; a higher one is newer")

    @model_validator(mode="after")
    def _one_of_epochs_and_weight(self) -> "Source":
        if self.epochs is not None and self.weight is not None:
            raise ValueError(f"source {self.name!r}: give epochs or weight, not both")
        return self


class Preferences(Section):
    """Which comparisons are used, as in section 4.2 of the report. Rows without a rating pass
    `min_rating`."""

    min_rating: Rating | None = Field("better", description="drop comparisons rated lower; null: keep all")
    max_similarity: float = Field(
        0.95, gt=0, le=1, description="drop pairs whose responses share a larger part of their token trigrams"
    )
    newest_batch_only: bool = Field(False, description="use only the sources of the highest `batch`")


class Data(Section):
    store: str = Field(description="directory of the packed zarr store")
    sources: tuple[Source, ...] = ()
    eval_sources: tuple[Source, ...] = ()
    pack_length: PositiveInt = Field(8192, description="tokens in a pack; every microbatch is one pack")
    overlong: Literal["error", "drop", "truncate"] = "error"
    max_bad_rows: int = Field(0, ge=0)
    train_on: TrainOn = Field(
        "all_turns",
        description="turns of the assistant that rows of `messages` train. A mark on a message (`weight`, "
        "`train`) comes first. Rows of prompt and completion train the completion.",
    )
    reasoning: Reasoning = Field(
        "refuse",
        description="what an assistant's `reasoning_content` or `thinking` becomes. refuse: its row is bad; "
        "drop: it is left out; render: it stands between <think> and </think> before the answer",
    )
    preferences: Preferences = Preferences()
    backend: Literal["torch", "dali"] = "torch"
    prefetch: PositiveInt = Field(4, description="microbatches prepared ahead in the background")


class Parallel(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = Field(
        1, description="model chunks a pipeline rank (interleaved schedule)"
    )
    embedding_and_loss_as_layers: bool = Field(
        False,
        description="the embedding and the loss count as a layer each when chunks are cut",
    )
    context: PositiveInt = 1
    sequence: bool = Field(
        False, description="shard activations between tensor-parallel regions over the sequence"
    )
    tp_comm_overlap: bool = Field(
        False,
        description="tensor-parallel gathers and scatters run beside the multiplications that they belong "
        "to, through Transformer Engine's user buffers; needs `sequence`",
    )
    cp_comm_type: Literal["p2p", "a2a", "a2a+p2p", "all_gather"] = Field(
        "p2p",
        description="how context-parallel ranks share attention in Transformer Engine. p2p: keys and values "
        "go round a ring; a2a: each rank has all tokens of some heads. It has the others for unpacked rows "
        "alone, so they are refused. The portable layers gather keys and values",
    )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the data: TP x CP x PP."""
        return self.tensor * self.pipeline * self.context


class Precision(Section):
    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None


class Recompute(Section):
    mode: Literal["none", "selective", "full"] = "none"
    modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)


class Optimizer(Section):
    lr: PositiveFloat = 1e-5
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    clip_grad: float = Field(1.0, ge=0, description="0: no clipping")
    overlap: bool = Field(
        False, description="overlap gradient reduce-scatter and parameter all-gather with compute"
    )
    gradient_accumulation_fusion: bool = Field(
        False,
        description="the multiplication that makes a layer's weight gradient adds it to the fp32 buffer "
        "itself; needs Transformer Engine",
    )
    overlap_param_gather_with_optimizer_step: bool = Field(
        False,
        description="gather the first model chunk's parameters while the other chunks are updated; needs "
        "`overlap` and parallel.virtual_pipeline > 1",
    )


class Loss(Section):
    trained_roles: tuple[RoleName, ...] = Field(
        ("body", "terminator"),
        min_length=1,
        description="token roles that carry loss; SFT must learn to stop",
    )
    impl: Literal["fused", "unfused"] = Field(
        "fused",
        description="SFT and DPO. fused: log-probabilities straight from hidden states, chunk by chunk; "
        "unfused: from the logits of all tokens, which must fit",
    )


class Reward(Section):
    """Reward model: `-log sigmoid(r_better - r_worse)` over all ranked pairs of an example."""

    layout: Literal["separate", "isolated", "concatenated"] = Field(
        "isolated",
        description="separate: a row a response; isolated: the prompt once, responses blind to each other; "
        "concatenated: responses see those before them (the report's approximation)",
    )
    head_lr_multiplier: PositiveFloat = 1.0


class DPO(Section):
    """Direct preference optimisation, with the report's values."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "simpo"] = "sigmoid"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="robust: probability of a flipped label")
    margin: float = Field(0.5, ge=0, description="simpo: target margin of the mean log-probabilities, x beta")
    nll_weight: float = Field(0.2, ge=0, description="weight of the NLL of the chosen response")
    nll_normalization: Literal["per_token", "per_sequence"] = Field(
        "per_token", description="per_token: mean over the response's tokens; per_sequence: their sum"
    )
    trained_roles: tuple[RoleName, ...] = Field(
        ("body",), min_length=1, description="roles in both terms; the report masks headers and terminators"
    )
    reference: Literal["store", "frozen"] = Field(
        "store", description="store: log-probabilities by `megatron-post reference`; frozen: a copy in memory"
    )

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"


class Train(Section):
    steps: PositiveInt
    global_batch: PositiveInt = Field(description="packs an optimizer step, over all data-parallel ranks")
    eval_every: int = Field(
        0, ge=0, description="steps between evaluations; 0: only at the end, if there is data"
    )
    eval_packs: PositiveInt = Field(64, description="held-out packs an evaluation, at most")
    log_every: PositiveInt = 1
    on_not_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a NaN or infinite loss or gradient. skip: pass over the step's packs; rollback: go back "
        "to the newest checkpoint and pass over them",
    )
    max_skips: int = Field(10, ge=0, description="steps passed over before the run stops, over all restarts")
    spike: PositiveFloat = Field(
        8.0, description="robust standard deviations above the median at which a loss or norm is recorded"
    )
    step_deadline: float = Field(
        1800.0, ge=0, description="seconds after which a step is a hang and the run ends; 0: never"
    )
    export_hf: bool = Field(False, description="write a Hugging Face directory when training ends")


class Checkpoint(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="keep steps that are a multiple of this as well; 0: none")
    asynchronous: bool = Field(
        True, description="train on while a checkpoint is written, from a copy in host memory"
    )


class Config(Section):
    """A run, complete. `load_config` makes one; the resolved form is saved with every checkpoint."""

    stage: Literal["sft", "reward", "dpo"] = "sft"
    run_dir: str = Field(description="checkpoints, metrics and exports of this run")
    seed: int = 1234
    model: Model
    tokenizer: Tokenizer
    data: Data
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    recompute: Recompute = Recompute()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    reward: Reward = Reward()
    dpo: DPO = DPO()
    train: Train
    checkpoint: Checkpoint = Checkpoint()

    @property
    def shares_prompts(self) -> bool:
        """Whether several responses see one prompt, which is beyond Transformer Engine's packed attention."""
        return self.stage == "reward" and self.reward.layout != "separate"

    @property
    def stores_reference(self) -> bool:
        """Whether the reference's log-probabilities are in the store."""
        return self.stage == "dpo" and self.dpo.needs_reference and self.dpo.reference == "store"

    @property
    def runs_reference(self) -> bool:
        """Whether a frozen copy of the first weights runs at every step."""
        return self.stage == "dpo" and self.dpo.needs_reference and self.dpo.reference == "frozen"

    @model_validator(mode="after")
    def _layout_works(self) -> "Config":
        errors = layout_errors(self)
        if errors:
            raise ValueError("\n".join(errors))
        return self
