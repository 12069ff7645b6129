"""The sections of a training run as frozen pydantic models.

Unknown keys are errors. Defaults are those of the Llama 3 report, if it gives them.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_post.config.adapter import Adapter
from megatron_post.config.data import Data, Tokenizer
from megatron_post.config.hf_shape import shape_of
from megatron_post.config.losses import DPO, Loss, Pretrain, Reward
from megatron_post.config.presets import PRESETS
from megatron_post.config.rope import RopeScaling
from megatron_post.config.section import Count, Distinct, Name, NonNegative, Positive, Section, Whole
from megatron_post.config.stages import STAGES, StageName, Traits
from megatron_post.config.tracking import Tracking
from megatron_post.storage.hub import model_directory
from megatron_post.storage.reading import did_you_mean


class Model(Section):
    """Shape of the model, by preset or by numbers. Numbers override those of the preset."""

    preset: Name | None = Field(
        None, description=f"shape of a published model, or a tiny one: {', '.join(PRESETS)}"
    )
    num_layers: int = Field(gt=0, le=10_000, description="transformer layers")
    hidden_size: int = Field(gt=0, le=2**20, description="width of the residual stream")
    ffn_hidden_size: int = Field(
        gt=0, le=2**24, description="width of the feed-forward layer, which is gated"
    )
    num_attention_heads: int = Field(gt=0, le=2**16, description="heads of queries")
    num_key_value_heads: int = Field(
        gt=0, le=2**16, description="heads of keys and values, which several query heads share"
    )
    vocab_size: int = Field(gt=0, le=2**24, description="tokens of the vocabulary")
    max_position_embeddings: Count = Field(description="longest context, for the exported config")
    rope_theta: Positive = Field(description="base of the rotary embedding's wavelengths")
    rope_scaling: RopeScaling | None = Field(None, description="null: the rotary embedding is not scaled")
    rms_norm_eps: Positive = Field(description="added to the mean square in each norm")
    tie_word_embeddings: bool = Field(description="the output layer uses the embedding's weights")
    initializer_range: Positive = Field(0.02, description="standard deviation of random weights")
    init_from: Name | None = Field(
        None,
        description="Hugging Face directory, or a model of the hub such as meta-llama/Llama-3.1-8B or "
        "meta-llama/Llama-3.1-8B@REVISION, to start from. Its shape need not be given. null: random weights, "
        "drawn by seed",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset")
        if name is None:
            return _with_shape(values)
        if not isinstance(name, str) or name not in PRESETS:
            meant = did_you_mean(str(name), list(PRESETS))
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}{meant}")
        return {**PRESETS[name], **values}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def _with_shape(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the shape of the model that they start from, unless they give a shape of their own."""
    start = values.get("init_from")
    given = [name for name, field in Model.model_fields.items() if field.is_required() and name in values]
    if not isinstance(start, str) or given:
        return values
    return {**shape_of(model_directory(start, whole=False)), **values}


class Parallel(Section):
    """How one copy of the model and its data is divided between ranks."""

    tensor: Count = Field(1, description="ranks that divide every matrix between them")
    pipeline: Count = Field(1, description="ranks that divide the layers between them")
    virtual_pipeline: Count = Field(1, description="model chunks per pipeline rank (interleaved schedule)")
    embedding_and_loss_as_layers: bool = Field(
        False,
        description="the embedding and the loss count as a layer each when chunks are cut",
    )
    context: Count = Field(1, description="ranks that divide the tokens of a pack between them")
    sequence: bool = Field(
        False, description="shard activations between tensor-parallel regions over the sequence"
    )
    tp_comm_overlap: bool = Field(
        False,
        description="overlap tensor-parallel all-gathers and reduce-scatters with matrix multiplications, "
        "through Transformer Engine's user buffers. Needs `sequence`",
    )
    cp_comm_type: Literal["p2p", "a2a", "a2a+p2p", "all_gather"] = Field(
        "p2p",
        description="how context-parallel ranks compute attention in Transformer Engine. p2p: they send keys "
        "and values around a ring. a2a: each rank has all tokens of some heads. Transformer Engine supports "
        "the others only for unpacked rows, so they are refused. The portable layers gather keys and values",
    )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the data: TP x CP x PP."""
        return self.tensor * self.pipeline * self.context


class Precision(Section):
    """The number formats of the forward and backward pass. The optimizer's are fp32."""

    dtype: Literal["bf16", "fp32"] = Field("bf16", description="format of weights and activations")
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        None, description="Transformer Engine's recipe for linear layers in FP8. null: no FP8"
    )
    fp8_param_gather: bool = Field(
        False,
        description="keep and gather the weights of linear layers in FP8. The optimizer, checkpoints and "
        "exports have them before rounding. Needs `fp8` tensorwise",
    )


class Recompute(Section):
    """Activations that are computed again in the backward pass, to save memory."""

    mode: Literal["none", "selective", "full"] = Field(
        "none", description="selective: the activations of `modules`. full: those of whole layers"
    )
    modules: Annotated[tuple[Literal["core_attn", "mlp", "layernorm"], ...], Distinct] = Field(
        ("core_attn",), min_length=1, description="the modules that mode=selective recomputes"
    )


class Optimizer(Section):
    """Adam with decoupled weight decay, and its learning-rate schedule."""

    lr: Positive = Field(1e-5, description="learning rate at its highest")
    min_lr: NonNegative = Field(
        0.0, description="learning rate of the last step, with a linear or cosine schedule"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: Whole = Field(0, description="steps over which the learning rate rises to `lr`")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of Adam's second moment")
    eps: Positive = Field(1e-8, description="added to the root of Adam's second moment")
    moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="the dtype of Adam's two moments. In bf16 they are rounded after each step, and take 4 "
        "bytes less for each parameter of a rank's optimizer",
    )
    clip_grad: NonNegative = Field(1.0, description="largest norm of the gradient. 0: no clipping")
    overlap: bool = Field(
        False, description="overlap gradient reduce-scatter and parameter all-gather with compute"
    )
    gradient_accumulation_fusion: bool = Field(
        False,
        description="the matrix multiplication for a weight gradient accumulates directly into the fp32 "
        "buffer. Needs Transformer Engine",
    )
    overlap_param_gather_with_optimizer_step: bool = Field(
        False,
        description="gather the first model chunk's parameters while the other chunks are updated. Needs "
        "`overlap` and parallel.virtual_pipeline > 1",
    )


class Train(Section):
    """The length of a run, its batches, and what happens when something goes wrong."""

    steps: Count = Field(description="optimizer steps of the whole run, including those before a restart")
    global_batch: Count = Field(description="packs per optimizer step, over all data-parallel ranks")
    eval_every: Whole = Field(
        0, description="steps between evaluations. 0: only at the end, if there is data"
    )
    eval_packs: Count = Field(64, description="the largest number of held-out packs per evaluation")
    log_every: Count = Field(1, description="steps between lines on the terminal")
    on_not_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="what happens at a NaN or infinite loss or gradient. skip: skip the step's packs. "
        "rollback: return to the newest checkpoint and skip them",
    )
    max_skips: Whole = Field(10, description="skipped steps before the run stops, over all restarts")
    spike: Positive = Field(
        8.0, description="robust standard deviations above the median at which a loss or norm is recorded"
    )
    step_deadline: NonNegative = Field(
        1800.0, description="seconds after which a step counts as a hang and the run ends. 0: never"
    )
    export_hf: bool = Field(False, description="write a Hugging Face directory when training ends")


class Checkpoint(Section):
    """When checkpoints are written, and which are kept."""

    every: Whole = Field(0, description="steps between checkpoints. 0: only at the end")
    keep: Count = Field(2, description="number of newest checkpoints to keep")
    keep_every: Whole = Field(0, description="also keep the steps that are a multiple of this. 0: none")
    asynchronous: bool = Field(
        True, description="continue training while a checkpoint is written from a copy in host memory"
    )


class UncheckedConfig(Section):
    """All sections of a run, each valid by itself. `Config` also checks that they fit together."""

    stage: StageName = Field("sft", description="training method")
    run_dir: Name = Field(description="checkpoints, metrics and exports of this run")
    seed: Whole = Field(1234, description="seed of random weights and of the order of the data")
    model: Model
    adapter: Adapter | None = Field(None, description="null: all weights of the model are trained")
    tokenizer: Tokenizer
    data: Data
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    recompute: Recompute = Recompute()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    reward: Reward = Reward()
    dpo: DPO = DPO()
    pretrain: Pretrain = Pretrain()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @property
    def traits(self) -> Traits:
        """The properties of the stage."""
        return STAGES[self.stage]

    @property
    def shares_prompts(self) -> bool:
        """Whether responses share a prompt, which Transformer Engine's packed attention does not support."""
        layouts: dict[str, str] = {"preferences": self.reward.layout, "pairs": self.dpo.layout}
        return layouts.get(self.traits.examples, "separate") != "separate"

    @property
    def joins_documents(self) -> bool:
        """Whether all documents of a pack are one segment for the attention."""
        return self.traits.examples == "documents" and self.pretrain.attention == "pack"

    @property
    def cuts_documents(self) -> bool:
        """Whether documents are cut at the ends of packs."""
        return self.traits.examples == "documents" and self.pretrain.documents == "cut"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return self.traits.has_reference and self.dpo.needs_reference

    @property
    def stores_reference(self) -> bool:
        """Whether the reference's log-probabilities are in the store."""
        return self.needs_reference and self.dpo.reference == "store"

    @property
    def copies_reference(self) -> bool:
        """Whether a frozen copy of the first weights is in memory."""
        return self.needs_reference and self.dpo.reference == "frozen"

    @property
    def runs_reference(self) -> bool:
        """Whether a reference runs forward at every step: a frozen copy, or the model without its adapter."""
        return self.needs_reference and self.dpo.reference != "store"
