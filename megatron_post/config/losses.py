"""The sections of a stage's loss: what is trained, and how responses or documents are compared."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_post.config.section import Distinct, NonNegative, Positive, Section

RoleName = Literal["header", "prompt", "body", "terminator"]


class Loss(Section):
    """Which tokens SFT trains, and how log-probabilities are computed."""

    trained_roles: Annotated[tuple[RoleName, ...], Distinct] = Field(
        ("body", "terminator"),
        min_length=1,
        description="token roles that carry loss. SFT needs the terminator so that models learn to stop",
    )
    impl: Literal["fused", "unfused"] = Field(
        "fused",
        description="for SFT, DPO and pretrain. fused: compute log-probabilities from hidden states, chunk "
        "by chunk. unfused: compute them from the logits of all tokens, which must fit into memory",
    )


class Reward(Section):
    """Reward model. The loss is `-log sigmoid(r_better - r_worse)` over all ranked pairs of an example."""

    layout: Literal["separate", "isolated", "concatenated"] = Field(
        "isolated",
        description="separate: one row per response. isolated: the prompt once, and no response sees another "
        "one. concatenated: responses also see those before them (the report's approximation)",
    )
    head_lr_multiplier: Positive = Field(1.0, description="the head's learning rate as a multiple of `lr`")


class DPO(Section):
    """Direct preference optimisation, with the report's values."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "simpo"] = Field(
        "sigmoid", description="loss of a pair. The report uses sigmoid"
    )
    beta: Positive = Field(0.1, description="strength of the pull to the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="robust: probability of a flipped label")
    margin: NonNegative = Field(0.5, description="simpo: target margin of the mean log-probabilities, x beta")
    layout: Literal["separate", "isolated"] = Field(
        "separate",
        description="separate: one row per response. isolated: the prompt once, and no response sees the "
        "other one, with the same loss",
    )
    nll_weight: NonNegative = Field(0.2, description="weight of the NLL of the chosen response")
    nll_normalization: Literal["per_token", "per_sequence"] = Field(
        "per_token", description="per_token: mean over the response's tokens. per_sequence: their sum"
    )
    trained_roles: Annotated[tuple[RoleName, ...], Distinct] = Field(
        ("body",), min_length=1, description="roles in both terms. The report masks headers and terminators"
    )
    reference: Literal["store", "frozen", "base"] = Field(
        "store",
        description="store: log-probabilities from `megatron-post reference`. frozen: a model copy in "
        "memory. base: the model without its adapter, which needs neither",
    )

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"


class Pretrain(Section):
    """Continued pre-training on documents. Every token after a document's begin-of-text is trained."""

    documents: Literal["cut", "whole"] = Field(
        "cut",
        description="cut: documents follow each other, and are cut at the ends of packs. whole: each "
        "document stays in one pack, and `data.overlong` says what happens to longer ones",
    )
    attention: Literal["document", "pack"] = Field(
        "document",
        description="document: a token sees only its own document, and positions begin at 0 in it. pack: "
        "it also sees the documents before its own in the pack, and positions continue",
    )
