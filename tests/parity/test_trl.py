"""TRL's DPOTrainer and RewardTrainer: the same weights, rows and optimizer give the same five steps.

What it takes to have TRL 1.16 train the same tokens under the same masks:
- Rows are conversational. Plain text gets its end-of-turn appended as text and is cut where the tokenised
  prompt and prompt + response part, which need not be the prompt's end; a chat template cuts behind the
  assistant's header. The tokenizer is ours as it is exported, and TRL's ids are compared with ours first.
- The pad token is not the end of turn: transformers reads a score at the last token that is not the pad
  token, and would read it before the terminator.
- TRL trains a response's terminator: here `dpo.trained_roles=(body, terminator)`.
- TRL has no NLL term; its `sft` loss is a mean over the chosen tokens of a microbatch, whose long responses
  weigh more. It is our mean over pairs where a microbatch is one pair.
- TRL's defaults that are switched off: shuffling, gradient checkpointing, bf16.
- The rate of each step: transformers begins a warm-up at 0 and ends above the lowest rate, one step earlier
  than we do.
AdamW, weight decay (no norm decays on either side), and clipping (it bites at every step) are the same
settings on both sides. TRL pads pairs to rows, we pack 3 and 5 of them.
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
from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.pack import Pack
from megatron_post.data.row_formats import example_of_row
from megatron_post.data.template import render_preferences
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer, train_small_tokenizer
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.run import build_trainer, make_stage
from tests.comparisons import PACK_LENGTH, Example, packs
from tests.ranks import run_ranks
from tests.tiny import tiny_config

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")

STEPS, COUNTS = 5, [3, 5]  # pairs of each of our packs of a step
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
GOOD, BAD = (
    WORDS[::2],
    WORDS[1::2],
)  # what chosen and rejected responses say, so that five steps teach something


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer([" ".join(WORDS)] * 9 + ["system user assistant"] * 9, 320).save(directory)
    return directory


@cache
def _rows() -> list[dict[str, Any]]:
    """Five steps of pairs in TRL's conversational form; every third prompt has a system message and an
    earlier turn, which carries no loss."""
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
    """The stage's config, and in `weights` beside it a random Hugging Face model for both sides."""
    tokenizer = load_tokenizer(tokenizer_directory)
    values: dict[str, Any] = {
        "model": {"vocab_size": tokenizer.vocab_size, "init_from": str(tmp_path / "weights")},
        "tokenizer": {"path": str(tokenizer_directory)},
        "data": {"pack_length": PACK_LENGTH},
        "optimizer": OPTIMIZER,
        "train": {"steps": STEPS, "global_batch": len(COUNTS)},
        **sections,
    }
    config = tiny_config(tmp_path / "run", **values).model_copy(update={"stage": stage})
    scalar = stage == "reward"
    hf = to_hf_config(
        config.model, dtype="float32", bos_id=1, eos_ids=[2], pad_id=tokenizer.pad_id, scalar_head=scalar
    )
    kind = transformers.LlamaForSequenceClassification if scalar else transformers.LlamaForCausalLM
    torch.manual_seed(5)
    kind(transformers.LlamaConfig(**hf)).save_pretrained(tmp_path / "weights")
    return config


def _ours(config: Config, layout: str) -> tuple[list[dict], list[np.ndarray], dict[str, np.ndarray]]:
    """Metrics of each step, each step's scores before it (chosen, then rejected), and the final weights."""
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


# of each of the five steps: two to warm up, three down to the lowest
RATES = (1e-3, 2e-3, 1.4e-3, 0.8e-3, 0.2e-3)


class _OurRates:
    """A transformers Trainer that trains with the rates of our schedule."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        theirs: Any = self
        rates = [rate / OPTIMIZER["lr"] for rate in (*RATES, RATES[-1])]  # it asks for one more
        theirs.lr_scheduler = LambdaLR(optimizer or theirs.optimizer, rates.__getitem__)
        return theirs.lr_scheduler


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


def _assert_same_steps(ours: list[dict], theirs: Any, names: dict[str, str]) -> None:
    """Every named metric at every step, to 2e-5 (measured: 5e-6 for the sums of log-probabilities, 4e-7 for
    losses and rewards); the gradient norm relative to itself."""
    log = [entry for entry in theirs.state.log_history if "grad_norm" in entry]
    assert len(log) == len(ours) == STEPS
    for ours_now, theirs_now in zip(ours, log, strict=True):
        for name, their_name in {"loss": "loss", "lr": "learning_rate", **names}.items():
            assert ours_now[name] == pytest.approx(theirs_now[their_name], abs=2e-5), (
                name,
                ours_now,
                theirs_now,
            )
        assert ours_now["grad_norm"] == pytest.approx(theirs_now["grad_norm"], rel=1e-5)
        assert ours_now["grad_norm"] > OPTIMIZER["clip_grad"]  # so that clipping is compared, too


def _assert_same_weights(ours: dict[str, np.ndarray], theirs: Any, before: Path) -> None:
    """After five steps every tensor has moved by the same vector."""
    start = type(theirs.model).from_pretrained(before).state_dict()
    after = theirs.model.state_dict()
    assert ours.keys() == after.keys()
    for name, value in ours.items():
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
    ("loss", "settings"),
    [
        ("sigmoid", {}),
        ("ipo", {}),
        ("hinge", {}),
        ("robust", {"label_smoothing": 0.2}),
    ],
)
def test_dpo(tmp_path: Path, tokenizer_directory: Path, loss: str, settings: dict[str, float]) -> None:
    """Each loss alone, two microbatches of four pairs there."""
    dpo = {"loss": loss, "trained_roles": TRL_MASK, "nll_weight": 0.0, "reference": "frozen", **settings}
    config = _config(tmp_path, tokenizer_directory, "dpo", dpo=dpo)
    theirs = _trl_dpo(config, tmp_path / "trl", microbatch=4, loss_type=[loss], **settings)
    ((ours, _, weights),) = run_ranks(_ours, 1, config, "separate")
    _assert_same_steps(ours, theirs, DPO_NAMES)
    _assert_same_weights(weights, theirs, tmp_path / "weights")


def test_dpo_with_nll(tmp_path: Path, tokenizer_directory: Path) -> None:
    """The report's loss, with 0.2 x the mean NLL of the chosen tokens. One pair a microbatch there, as said
    above; the pairs of a step are the same."""
    dpo = {"trained_roles": TRL_MASK, "nll_weight": 0.2, "nll_normalization": "per_token"}
    config = _config(tmp_path, tokenizer_directory, "dpo", dpo={**dpo, "reference": "frozen"})
    theirs = _trl_dpo(
        config, tmp_path / "trl", microbatch=1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]
    )
    ((ours, _, weights),) = run_ranks(_ours, 1, config, "separate")
    _assert_same_steps(ours, theirs, DPO_NAMES)
    _assert_same_weights(weights, theirs, tmp_path / "weights")
    assert ours[0]["loss"] == pytest.approx(np.log(2) + 0.2 * ours[0]["nll"], abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # CPO is one of TRL's experimental trainers, and says so
def test_simpo() -> None:
    """TRL has SimPO in its CPOTrainer, on mean log-probabilities and with gamma where we have beta x margin.
    Only its formula is compared: that trainer tokenises in another way."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    chosen, rejected, unused = -20 * torch.rand(3, 8)
    lengths = torch.arange(1.0, 17.0).reshape(2, 8)
    settings = DPOSettings(beta=2.0, margin=0.5)
    ours = LOSSES["simpo"](PairLogps(chosen, rejected, unused, unused, *lengths), settings)
    device = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(
        alpha=0.0, accelerator=device, loss_type="simpo", beta=2.0, simpo_gamma=1.0, label_smoothing=0.0
    )
    theirs, _, _ = cpo.CPOTrainer.cpo_loss(trainer, chosen / lengths[0], rejected / lengths[1])
    torch.testing.assert_close(ours, theirs)


def test_terminator_mask_is_the_difference(tmp_path: Path, tokenizer_directory: Path) -> None:
    """Llama 3's mask leaves the terminators out: the same rows then give other log-probabilities at once, and
    another loss as soon as the policy has left its reference. No tolerance here would hide it."""
    dpo = {"nll_weight": 0.0, "reference": "frozen"}
    masked = _config(tmp_path, tokenizer_directory, "dpo", dpo=dpo)
    as_trl = masked.model_copy(update={"dpo": masked.dpo.model_copy(update={"trained_roles": TRL_MASK})})
    ((ours, _, _),), ((theirs, _, _),) = (run_ranks(_ours, 1, c, "separate") for c in (masked, as_trl))
    assert ours[0]["logps_chosen"] > theirs[0]["logps_chosen"] + 1.0
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-6)
    assert abs(ours[-1]["loss"] - theirs[-1]["loss"]) > 1e-3


@pytest.mark.parametrize("layout", ["separate", "isolated"])
def test_reward(tmp_path: Path, tokenizer_directory: Path, layout: str) -> None:
    """Every response's score before each step, loss, margin and accuracy; `isolated` shares the prompt of a
    pair, TRL repeats it."""

    their_scores = []

    class Recorder(_OurRates, trl.RewardTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            their_scores.append(outputs.logits.detach()[:, 0].numpy().copy())
            return loss

    config = _config(tmp_path, tokenizer_directory, "reward", reward={"layout": layout})
    theirs = Recorder(
        model=config.model.init_from,
        args=trl.RewardConfig(**_trl_settings(config, tmp_path / "trl", microbatch=PAIRS)),
        train_dataset=datasets.Dataset.from_list(_rows()),
        processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer_directory),
    )
    for row, example in zip(
        theirs.train_dataset, _examples(load_tokenizer(tokenizer_directory)), strict=True
    ):
        for name, response in zip(("chosen_ids", "rejected_ids"), example.responses, strict=True):
            assert row[name] == [*example.prompt.tokens.tolist(), *response.tokens.tolist()]
    theirs.train()
    ((ours, scores, weights),) = run_ranks(_ours, 1, config, layout)
    _assert_same_steps(ours, theirs, {"margin": "margin", "accuracy": "accuracy"})
    np.testing.assert_allclose(scores, their_scores, atol=2e-5)
    assert np.abs(scores[-1] - scores[0]).max() > 0.1
    _assert_same_weights(weights, theirs, tmp_path / "weights")
