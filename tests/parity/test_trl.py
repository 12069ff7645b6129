"""With the same weights, rows and optimizer, five steps equal those of TRL's DPOTrainer and RewardTrainer.

TRL 1.16 trains the same tokens under the same masks only under these conditions:
- Rows are conversational. TRL appends the end of turn to plain text as text. It cuts plain text where the
  tokens of the prompt and of prompt + response differ, which need not be the prompt's end. With a chat
  template it cuts after the assistant's header. Both sides use our exported tokenizer, and the token ids are
  compared first.
- The pad token is not the end of turn. transformers reads a score at the last token that is not the pad
  token, so otherwise it would read the score before the terminator.
- TRL trains a response's terminator. Our setting for that is `dpo.trained_roles=(body, terminator)`.
- TRL has no NLL term. Its `sft` loss is a mean over the chosen tokens of a microbatch, in which long
  responses weigh more. It equals our mean over pairs if a microbatch is one pair.
- Shuffling, gradient checkpointing and bf16 are defaults of TRL, and are switched off.
- The learning rate of each step is set explicitly. transformers starts a warm-up at 0 and ends above the
  lowest rate, one step earlier than our schedule.

AdamW, weight decay (of no norm) and clipping (active at every step) have the same settings on both sides. TRL
pads pairs to rows. Our side packs 3 and 5 pairs.
"""

import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron_post_kernels.pair_losses import LOSSES, DPOSettings, PairLogps
from torch.optim.lr_scheduler import LambdaLR

from megatron_post.config.data import Source
from megatron_post.config.layout import store_layout
from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.pack import Pack
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.template import render_preferences
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer, train_small_tokenizer
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.parts import build_trainer, make_stage
from tests.comparisons import PACK_LENGTH, Example, packs
from tests.ranks import run_ranks
from tests.tiny import tiny_config

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")

STEPS, COUNTS = 5, [3, 5]  # a step of our side has two packs, with this many pairs
PAIRS = sum(COUNTS)
OPTIMIZER = {
    "lr": 2e-3,
    "min_lr": 2e-4,
    "schedule": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "clip_grad": 0.2,
}
TRL_MASK = ("body", "terminator")
WORDS = ("red", "green", "blue", "seven", "eleven", "apples", "trains", "rain", "because", "why", "3", "14")
# Chosen and rejected responses use different words, so that five steps can learn a difference.
GOOD, BAD = WORDS[::2], WORDS[1::2]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer([" ".join(WORDS)] * 9 + ["system user assistant"] * 9, 320).save(directory)
    return directory


@cache
def _rows() -> list[dict[str, Any]]:
    """Five steps of pairs in TRL's conversational form.

    Every third prompt has a system message and an earlier turn, which carries no loss.
    """
    draw = random.Random(0)

    def message(role: str, words: tuple[str, ...] = WORDS) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(1, 8)))}

    rows = []
    for number in range(STEPS * PAIRS):
        history = [message(role) for role in ("system", "user", "assistant")] if number % 3 == 0 else []
        chosen, rejected = message("assistant", GOOD), message("assistant", BAD)
        rows.append({"prompt": [*history, message("user")], "chosen": [chosen], "rejected": [rejected]})
    return rows


def _examples(tokenizer: Tokenizer) -> list[Example]:
    source = Source(name="rows", path="rows.jsonl")
    preferences: list[Any] = [example_of_row(row, source) for row in _rows()]
    return [Example(*rendered) for rendered in render_preferences(preferences, tokenizer)]


def _packs(tokenizer: Tokenizer, layout: str) -> list[list[Pack]]:
    made = _examples(tokenizer)
    return [packs(made[i : i + PAIRS], counts=COUNTS, layout=layout) for i in range(0, len(made), PAIRS)]


def _config(tmp_path: Path, tokenizer_directory: Path, stage: str, **sections: Any) -> Config:
    """The stage's config. A random Hugging Face model for both sides is written to `weights`."""
    tokenizer = load_tokenizer(tokenizer_directory)
    values: dict[str, Any] = {
        "model": {"vocab_size": tokenizer.vocab_size, "init_from": str(tmp_path / "weights")},
        "tokenizer": {"path": str(tokenizer_directory)},
        "data": {"pack_length": PACK_LENGTH},
        "optimizer": OPTIMIZER,
        "train": {"steps": STEPS, "global_batch": len(COUNTS)},
        **sections,
    }
    config = tiny_config(tmp_path / "run", stage=stage, **values)
    scalar = stage == "reward"
    hf = to_hf_config(
        config.model, dtype="float32", bos_id=1, eos_ids=[2], pad_id=tokenizer.pad_id, scalar_head=scalar
    )
    kind = transformers.LlamaForSequenceClassification if scalar else transformers.LlamaForCausalLM
    torch.manual_seed(5)
    kind(transformers.LlamaConfig(**hf)).save_pretrained(tmp_path / "weights")
    return config


def _our_steps(config: Config, layout: str) -> tuple[list[dict], list[np.ndarray], dict[str, np.ndarray]]:
    """Metrics and scores (chosen, then rejected) of each step, and the final weights.

    The scores are computed before the step.
    """
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, _ = build_trainer(config, topology)
        stage: Any = make_stage(config, topology)
        metrics, scores = [], []
        for step in _packs(load_tokenizer(config.tokenizer.path), layout):
            if config.stage == "reward":
                scores.append(_scores(trainer.stepper.outputs(step), stage))
            metrics.append(trainer.step(step))
        weights = gathered_tensors([chunk.module for chunk in trainer.chunks], config.model)
        return metrics, scores, {name: value.numpy().copy() for name, value in weights}


def _scores(outputs: list[tuple[Any, Any]], stage: Any) -> np.ndarray:
    chosen, rejected = [], []
    for output, batch in outputs:
        with torch.no_grad():
            scores = stage.scores(output, batch)
        chosen.append(scores[batch.comparisons.better])
        rejected.append(scores[batch.comparisons.worse])
    return torch.cat(chosen + rejected).numpy()


# Learning rates of the five steps: two to warm up, three down to the lowest.
RATES = (1e-3, 2e-3, 1.4e-3, 0.8e-3, 0.2e-3)


class _OurRates:
    """A transformers Trainer that uses the learning rates of our schedule."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        trainer: Any = self
        # transformers asks for one rate more than there are steps
        rates = [rate / OPTIMIZER["lr"] for rate in (*RATES, RATES[-1])]
        trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, rates.__getitem__)
        return trainer.lr_scheduler


class _DPOTrainer(_OurRates, trl.DPOTrainer):
    pass


def _trl_settings(config: Config, directory: Path, *, microbatch: int) -> dict[str, Any]:
    o = config.optimizer
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": PAIRS // microbatch,
        "train_sampling_strategy": "sequential",
        "learning_rate": o.lr,
        "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_epsilon": o.eps,
        "max_grad_norm": o.clip_grad,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _trl_dpo(config: Config, directory: Path, *, microbatch: int, **settings: Any) -> Any:
    trainer = _DPOTrainer(
        model=config.model.init_from,
        args=trl.DPOConfig(**_trl_settings(config, directory, microbatch=microbatch), **settings),
        train_dataset=datasets.Dataset.from_list(_rows()),
        processing_class=transformers.AutoTokenizer.from_pretrained(config.tokenizer.path),
    )
    for row, example in zip(
        trainer.train_dataset, _examples(load_tokenizer(config.tokenizer.path)), strict=True
    ):
        assert row["prompt_ids"] == example.prompt.tokens.tolist()
        assert row["chosen_ids"] == example.responses[0].tokens.tolist()
        assert row["rejected_ids"] == example.responses[1].tokens.tolist()
    trainer.train()
    return trainer


def _assert_same_steps(our_metrics: list[dict], trl_trainer: Any, names: dict[str, str]) -> None:
    """Every named metric is equal at every step, to 2e-5. The gradient norm is compared relative to itself.

    Differences of 5e-6 were measured for the sums of log-probabilities, and 4e-7 for losses and rewards.
    """
    log = [entry for entry in trl_trainer.state.log_history if "grad_norm" in entry]
    assert len(log) == len(our_metrics) == STEPS
    for our_step, trl_step in zip(our_metrics, log, strict=True):
        for name, trl_name in {"loss": "loss", "lr": "learning_rate", **names}.items():
            assert our_step[name] == pytest.approx(trl_step[trl_name], abs=2e-5), (name, our_step, trl_step)
        assert our_step["grad_norm"] == pytest.approx(trl_step["grad_norm"], rel=1e-5)
        assert our_step["grad_norm"] > OPTIMIZER["clip_grad"]  # otherwise clipping would not be compared


def _assert_same_weights(our_weights: dict[str, np.ndarray], trl_trainer: Any, before: Path) -> None:
    """After five steps every tensor has moved by the same vector."""
    start = type(trl_trainer.model).from_pretrained(before).state_dict()
    after = trl_trainer.model.state_dict()
    assert our_weights.keys() == after.keys()
    for name, value in our_weights.items():
        moved = after[name].numpy() - start[name].numpy()
        assert np.linalg.norm(value - after[name].numpy()) <= 1e-3 * np.linalg.norm(moved), name


DPO_NAMES = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
}


@pytest.mark.parametrize(
    ("loss", "layout", "settings"),
    [
        ("sigmoid", "separate", {}),
        ("sigmoid", "isolated", {}),
        ("ipo", "separate", {}),
        ("hinge", "separate", {}),
        ("robust", "separate", {"label_smoothing": 0.2}),
    ],
)
def test_dpo(
    tmp_path: Path, tokenizer_directory: Path, loss: str, layout: str, settings: dict[str, float]
) -> None:
    """Each loss is compared alone. TRL takes two microbatches of four pairs, and repeats each prompt."""
    dpo = {"loss": loss, "layout": layout, "trained_roles": TRL_MASK, "nll_weight": 0.0, **settings}
    dpo["reference"] = "frozen"
    config = _config(tmp_path, tokenizer_directory, "dpo", dpo=dpo)
    trainer = _trl_dpo(config, tmp_path / "trl", microbatch=4, loss_type=[loss], **settings)
    ((metrics, _, weights),) = run_ranks(_our_steps, 1, config, store_layout(config))
    _assert_same_steps(metrics, trainer, DPO_NAMES)
    _assert_same_weights(weights, trainer, tmp_path / "weights")


def test_dpo_with_nll(tmp_path: Path, tokenizer_directory: Path) -> None:
    """The report's loss has 0.2 x the mean NLL of the chosen tokens. TRL takes one pair in a microbatch.

    The module's docstring says why. The pairs of a step are the same on both sides.
    """
    dpo = {"trained_roles": TRL_MASK, "nll_weight": 0.2, "nll_normalization": "per_token"}
    config = _config(tmp_path, tokenizer_directory, "dpo", dpo={**dpo, "reference": "frozen"})
    trainer = _trl_dpo(
        config, tmp_path / "trl", microbatch=1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]
    )
    ((metrics, _, weights),) = run_ranks(_our_steps, 1, config, "separate")
    _assert_same_steps(metrics, trainer, DPO_NAMES)
    _assert_same_weights(weights, trainer, tmp_path / "weights")
    assert metrics[0]["loss"] == pytest.approx(np.log(2) + 0.2 * metrics[0]["nll"], abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # CPO warns that it is one of TRL's experimental trainers
def test_simpo() -> None:
    """The formula equals that of TRL's CPOTrainer.

    CPOTrainer uses mean log-probabilities, and its gamma is our beta x margin. Only the formula is compared,
    because that trainer tokenises in another way.
    """
    cpo = pytest.importorskip("trl.experimental.cpo")
    chosen, rejected, unused = -20 * torch.rand(3, 8)
    lengths = torch.arange(1.0, 17.0).reshape(2, 8)
    settings = DPOSettings(beta=2.0, margin=0.5)
    loss = LOSSES["simpo"](PairLogps(chosen, rejected, unused, unused, *lengths), settings)
    device = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=device, loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.0
    )
    trl_loss, _, _ = cpo.CPOTrainer.cpo_loss(trainer, chosen / lengths[0], rejected / lengths[1])
    torch.testing.assert_close(loss, trl_loss)


def test_terminator_mask_is_the_difference(tmp_path: Path, tokenizer_directory: Path) -> None:
    """Llama 3's mask leaves the terminators out, and no tolerance of these tests hides the difference.

    The same rows then have other log-probabilities at once. The loss differs as soon as the policy has left
    its reference.
    """
    dpo = {"nll_weight": 0.0, "reference": "frozen"}
    masked = _config(tmp_path, tokenizer_directory, "dpo", dpo=dpo)
    as_trl = masked.model_copy(update={"dpo": masked.dpo.model_copy(update={"trained_roles": TRL_MASK})})
    ((llama, _, _),), ((trl_mask, _, _),) = (
        run_ranks(_our_steps, 1, config, "separate") for config in (masked, as_trl)
    )
    assert llama[0]["logps_chosen"] > trl_mask[0]["logps_chosen"] + 1.0
    assert llama[0]["loss"] == pytest.approx(trl_mask[0]["loss"], abs=1e-6)
    assert abs(llama[-1]["loss"] - trl_mask[-1]["loss"]) > 1e-3


@pytest.mark.parametrize("layout", ["separate", "isolated"])
def test_reward(tmp_path: Path, tokenizer_directory: Path, layout: str) -> None:
    """Every response's score before each step is equal, and so are loss, margin and accuracy.

    `isolated` stores the prompt of a pair once. TRL repeats it.
    """

    trl_scores = []

    class Recorder(_OurRates, trl.RewardTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            trl_scores.append(outputs.logits.detach()[:, 0].numpy().copy())
            return loss

    config = _config(tmp_path, tokenizer_directory, "reward", reward={"layout": layout})
    trainer = Recorder(
        model=config.model.init_from,
        args=trl.RewardConfig(**_trl_settings(config, tmp_path / "trl", microbatch=PAIRS)),
        train_dataset=datasets.Dataset.from_list(_rows()),
        processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer_directory),
    )
    for row, example in zip(
        trainer.train_dataset, _examples(load_tokenizer(tokenizer_directory)), strict=True
    ):
        for name, response in zip(("chosen_ids", "rejected_ids"), example.responses, strict=True):
            assert row[name] == [*example.prompt.tokens.tolist(), *response.tokens.tolist()]
    trainer.train()
    ((metrics, scores, weights),) = run_ranks(_our_steps, 1, config, layout)
    _assert_same_steps(metrics, trainer, {"margin": "margin", "accuracy": "accuracy"})
    np.testing.assert_allclose(scores, trl_scores, atol=2e-5)
    assert np.abs(scores[-1] - scores[0]).max() > 0.1
    _assert_same_weights(weights, trainer, tmp_path / "weights")
