"""A table that says whether each setting may change when a run resumes.

identity: the setting defines the run. With another value it would be another run, so it cannot resume.
free:     the setting may change. The new value is applied, and the change is recorded.
harmless: nothing that is trained, measured or saved depends on the setting.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_post.config.stages import STAGES

Kind = Literal["identity", "free", "harmless"]
Settings = Mapping[str, Any]  # every key of a config with its value, from `settings.flatten`


@dataclass(frozen=True)
class Rule:
    """Keys of one kind, with the reason. A `*` in a key stands for the index of an entry in a list.

    applies: whether the keys have an effect in a run with these settings. If not, their kind is `otherwise`.
    """

    kind: Kind
    why: str
    keys: tuple[str, ...]
    applies: Callable[[Settings], bool] = lambda settings: True
    otherwise: Kind = "harmless"


def _keys(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


def _is(*stages: str) -> Callable[[Settings], bool]:
    return lambda settings: settings["stage"] in stages


def _has_reference(settings: Settings) -> bool:
    return STAGES[settings["stage"]].has_reference and settings["dpo.loss"] != "simpo"


def _draws_weights(settings: Settings) -> bool:
    return settings["model.init_from"] is None or STAGES[settings["stage"]].scalar_head


_ROWS = "split subset format columns epochs weight max_rows train_on templated ignore batch"

RULES = (
    Rule("identity", "the stage decides the loss", ("stage",)),
    Rule("identity", "the seed orders the samples, and random weights are drawn from it", ("seed",)),
    Rule(
        "identity",
        "the function that the weights are trained for",
        (
            *_keys("model", "num_layers hidden_size ffn_hidden_size num_attention_heads"),
            *_keys("model", "num_key_value_heads vocab_size rope_theta rms_norm_eps tie_word_embeddings"),
            *_keys("model.rope_scaling", "factor low_freq_factor high_freq_factor"),
            "model.rope_scaling.original_max_position_embeddings",
        ),
    ),
    Rule(
        "identity",
        "the weights that the run began with, and a reference, compared by content, so the path may change",
        ("model.init_from",),
    ),
    Rule(
        "identity",
        "random weights are drawn with it. It is free if none are drawn, because it is then only exported",
        ("model.initializer_range",),
        applies=_draws_weights,
        otherwise="free",
    ),
    Rule("identity", "the number format of weights and gradients", ("precision.dtype",)),
    Rule(
        "identity",
        "a policy and its reference must use the same arithmetic. It is free without a reference",
        ("precision.fp8",),
        applies=_has_reference,
        otherwise="free",
    ),
    Rule(
        "identity",
        "the packs, their order and their roles, compared by content, so the path may change",
        ("data.store",),
    ),
    Rule(
        "identity",
        "the tokenizer decides token ids. It is compared by content, so the path may change",
        ("tokenizer.path",),
    ),
    Rule(
        "identity",
        "the store was packed with it. Another value needs another store, and so is another run",
        (
            *_keys("data", "pack_length overlong train_on reasoning"),
            *_keys("data.preferences", "min_rating max_similarity newest_batch_only"),
            *_keys("data.sources.*", f"name {_ROWS}"),
            *_keys("data.steps", "separator neutral"),
            *_keys("data.prompted", "max_examples held_out_tasks"),
            *_keys("data.prompted.sources.*", "source names task"),
            "tokenizer.content_tokens",
        ),
    ),
    Rule(
        "identity",
        "the trained parameters. The adapter that a run began with is compared by content",
        _keys("adapter", "kind rank alpha targets dropout init_from"),
    ),
    Rule("identity", "the loss of SFT", ("loss.trained_roles",), applies=_is("sft")),
    Rule("identity", "the loss of a reward model", ("reward.layout",), applies=_is("reward")),
    Rule(
        "identity",
        "what a document's tokens see, and how documents are packed",
        _keys("pretrain", "documents attention"),
        applies=_is("pretrain"),
    ),
    Rule(
        "identity",
        "the loss of DPO and its reference",
        _keys(
            "dpo",
            "loss beta label_smoothing margin layout nll_weight nll_normalization trained_roles reference",
        ),
        applies=_is("dpo"),
    ),
    Rule(
        "free",
        "the schedule, weight decay and Adam. The checkpoint only gives the position and the moments",
        _keys("optimizer", "lr min_lr schedule warmup_steps weight_decay beta1 beta2 eps clip_grad overlap"),
    ),
    Rule(
        "free",
        "the dtype of Adam's moments. Those of a checkpoint are rounded to bf16 or widened to fp32",
        ("optimizer.moments",),
    ),
    Rule(
        "free",
        "a part of the schedule",
        ("reward.head_lr_multiplier",),
        applies=_is("reward", "step_reward"),
    ),
    Rule(
        "free",
        "the run's length and its batch. No sample is repeated or skipped",
        _keys("train", "steps global_batch"),
    ),
    Rule(
        "free",
        "the layout. Checkpoints do not depend on it, and every layout has the same gradients",
        (
            *_keys(
                "parallel",
                "tensor pipeline virtual_pipeline embedding_and_loss_as_layers context sequence "
                "tp_comm_overlap cp_comm_type",
            ),
            *_keys("recompute", "mode modules"),
            *_keys("data", "backend prefetch"),
        ),
    ),
    Rule(
        "free",
        "the speed, and not the result",
        (
            *_keys("optimizer", "gradient_accumulation_fusion overlap_param_gather_with_optimizer_step"),
            "precision.fp8_param_gather",
        ),
    ),
    Rule(
        "free", "two ways to compute the same values", ("loss.impl",), applies=_is("sft", "dpo", "pretrain")
    ),
    Rule(
        "free",
        "when checkpoints are written, and which are kept",
        _keys("checkpoint", "every keep keep_every asynchronous"),
    ),
    Rule("free", "how a run reacts to faults", _keys("train", "on_not_finite max_skips spike step_deadline")),
    Rule(
        "free",
        "evaluation, which does not affect training",
        (*_keys("train", "eval_every eval_packs"), *_keys("data.eval_sources.*", f"name {_ROWS}")),
    ),
    Rule("free", "what is exported at the end", ("train.export_hf", "model.max_position_embeddings")),
    Rule(
        "harmless",
        "paths, what is printed and tracked, and names for the values of other keys",
        (
            *("run_dir", "model.preset", "train.log_every", "data.max_bad_rows"),
            *("data.sources.*.path", "data.eval_sources.*.path"),
            *(*_keys("tracking.wandb", "project entity name tags mode"),),
            *(*_keys("tracking.mlflow", "uri experiment name"),),
            "data.prompted.sources.*.templates",  # the store has a digest of each template
        ),
    ),
)

_RULE_OF = {key: rule for rule in RULES for key in rule.keys}


def kind_of(key: str, settings: Settings) -> Kind | None:
    """The kind of a key of `settings.schema_keys` in a run with these settings, or None without a rule."""
    rule = _RULE_OF.get(key)
    if rule is None:
        return None
    return rule.kind if rule.applies(settings) else rule.otherwise
