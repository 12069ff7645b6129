"""The learning rate of every step, and Adam's settings of a resumed run, come from the config."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from megatron.core.optimizer import MegatronOptimizer

from megatron_post.config.schema import Config
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.checkpoint import Position
from megatron_post.train.optimizer import build_scheduler, place_scheduler
from megatron_post.train.parts import build_trainer
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs


def _rates(*, steps: int, after: int = 0, **optimizer: Any) -> list[float]:
    """The learning rates of steps `after` + 1 to `steps`."""
    config = tiny_config(optimizer=optimizer, train={"steps": steps})
    fake = SimpleNamespace(param_groups=[{}])
    scheduler, rates = build_scheduler(cast(MegatronOptimizer, fake), config), []
    place_scheduler(scheduler, after=after)
    for _ in range(after, steps):
        rates.append(fake.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return rates


def test_a_warm_up_begins_above_zero_and_the_last_step_has_min_lr() -> None:
    """A warm-up of 4 steps to 0.8 has the rates 0.2, 0.4, 0.6 and 0.8.

    Then 5 steps lead down to 0.3. The linear schedule falls by 0.1 a step, and the cosine schedule has the
    rates 0.3 + 0.5 (1 + cos(pi k / 5)) / 2 for k = 1 to 5.
    """
    linear = _rates(steps=9, lr=0.8, min_lr=0.3, warmup_steps=4, schedule="linear")
    assert linear == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    cosine = _rates(steps=9, lr=0.8, min_lr=0.3, warmup_steps=4, schedule="cosine")
    falling = [0.3 + 0.25 * (1 + math.cos(math.pi * k / 5)) for k in range(1, 6)]
    assert cosine == pytest.approx([0.2, 0.4, 0.6, 0.8, *falling])
    assert linear[-1] == cosine[-1] == 0.3  # exactly
    constant = _rates(steps=6, lr=0.8, warmup_steps=2, schedule="constant")
    assert constant == pytest.approx([0.4, 0.8, 0.8, 0.8, 0.8, 0.8])


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    linear = {"lr": 1.0, "schedule": "linear"}
    assert _rates(steps=5, **linear) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert _rates(steps=2, **linear) == [1.0, 0.0]
    assert _rates(steps=1, **linear) == [1.0]  # with a rate of 0 the run would train nothing
    assert _rates(steps=3, warmup_steps=3, **linear) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_a_placed_scheduler_has_the_same_rates_as_one_that_took_the_steps() -> None:
    for schedule in ({"schedule": "constant"}, {"schedule": "linear", "min_lr": 0.1}, {"min_lr": 0.1}):
        settings: dict[str, Any] = {"lr": 0.7, "warmup_steps": 3, "schedule": "cosine"} | schedule
        for after in range(9):
            assert _rates(steps=9, after=after, **settings) == _rates(steps=9, **settings)[after:]


FIRST: dict[str, Any] = {"lr": 2e-3, "schedule": "cosine", "weight_decay": 0.1}
SECOND: dict[str, Any] = {
    "lr": 1e-3,
    "min_lr": 1e-4,
    "schedule": "linear",
    "weight_decay": 0.3,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-6,
    "clip_grad": 0.5,
}


def _steps(trainer: Any, numbers: range) -> list[tuple[float, float]]:
    """Take some steps, each on other packs. Returns their losses and learning rates."""
    taken = [trainer.step(tiny_packs(4, seed=number)) for number in numbers]
    return [(values["loss"], values["lr"]) for values in taken]


def _weights(trainer: Any, config: Config) -> dict[str, Any]:
    tensors = gathered_tensors([chunk.module for chunk in trainer.chunks], config.model)
    return {name: value.numpy().copy() for name, value in tensors}


def _train(config: Config, last: int) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Train from the newest checkpoint to step `last`, and save there."""
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, start = build_trainer(config, topology)
        taken = _steps(trainer, range(start.step + 1, last + 1))
        trainer.save(Position(last, 4 * last))
        trainer.checkpoints.wait()
        return taken, _weights(trainer, config)


def _set_by_hand(config: Config) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Take four steps, set Adam and its learning rate by hand as SECOND says, and take four more steps."""
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, _ = build_trainer(config, topology)
        taken = _steps(trainer, range(1, 5))
        trainer.optimizer.config.clip_grad = SECOND["clip_grad"]
        for number in range(5, 9):
            for group in trainer.optimizer.param_groups:
                decays = group["wd_mult"] > 0
                group |= {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3 if decays else 0.0}
                group["lr"] = 1e-4 + 9e-4 * (8 - number) / 7
            taken += _steps(trainer, range(number, number + 1))
        return taken, _weights(trainer, config)


def test_an_extended_run_follows_its_new_config(tmp_path: Path) -> None:
    """Losses and weights are bit for bit those of one process in which Adam is set by hand.

    With the first config, step 4 of 4 has rate 0. Steps 5 to 8 have the second config's rates, weight decay,
    betas, epsilon and clipping, and continue with Adam's moments of the first.
    """
    first = tiny_config(tmp_path / "run", optimizer=FIRST, train={"steps": 4})
    second = tiny_config(tmp_path / "run", optimizer=SECOND, train={"steps": 8})
    ((before, _),) = run_ranks(_train, 1, first, 4)
    ((after, weights),) = run_ranks(_train, 1, second, 8)
    by_hand = first.model_copy(update={"run_dir": str(tmp_path / "by_hand")})
    ((expected, expected_weights),) = run_ranks(_set_by_hand, 1, by_hand)
    assert before[-1][1] == 0.0 and after[-1][1] == 1e-4
    assert [rate for _, rate in after] == pytest.approx([1e-4 + 9e-4 * k / 7 for k in (3, 2, 1, 0)])
    assert [loss for loss, _ in before + after] == [loss for loss, _ in expected]
    for name, value in weights.items():
        assert (value == expected_weights[name]).all(), name


def test_an_extended_run_with_a_constant_rate_equals_one_long_run(tmp_path: Path) -> None:
    """Four steps extended to eight equal eight steps in one run, bit for bit, on two data-parallel ranks."""
    taken = {}
    for name, lengths in (("extended", (4, 8)), ("at once", (8,))):
        for steps in lengths:
            config = tiny_config(tmp_path / name, optimizer={"warmup_steps": 2}, train={"steps": steps})
            (taken[name], weights), _ = run_ranks(_train, 2, config, steps)
            taken[name] = [*taken[name], weights]
    assert taken["extended"][:-1] == taken["at once"][4:-1]
    for name, value in taken["extended"][-1].items():
        assert (value == taken["at once"][-1][name]).all(), name


def _groups(config: Config) -> list[tuple[float, float]]:
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, start = build_trainer(config, topology)
        if not start.step:
            trainer.save(Position(2, 8))
            trainer.checkpoints.wait()
        return sorted((group["lr"], group["wd_mult"]) for group in trainer.optimizer.param_groups)


def test_the_multiplier_of_a_head_comes_from_the_config(tmp_path: Path) -> None:
    """megatron-core distinguishes groups by weight decay only, and would give body and head the same rate."""
    values: dict[str, Any] = {"stage": "reward", "optimizer": {"lr": 1e-3, "schedule": "constant"}}
    first = tiny_config(tmp_path / "run", reward={"head_lr_multiplier": 5.0}, **values)
    second = tiny_config(tmp_path / "run", reward={"head_lr_multiplier": 3.0}, **values)
    assert run_ranks(_groups, 1, first) == [[(1e-3, 0.0), (1e-3, 1.0), (5e-3, 1.0)]]
    assert run_ranks(_groups, 1, first) == [[(1e-3, 0.0), (1e-3, 1.0), (5e-3, 1.0)]]
    assert run_ranks(_groups, 1, second) == [[(1e-3, 0.0), (1e-3, 1.0), (3e-3, 1.0)]]
