"""A run on a GPU without Transformer Engine and Apex resumes exactly. A CPU stands in for the GPU."""

from pathlib import Path

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_post.config.schema import Config
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.checkpoint import Position
from megatron_post.train.parts import build_trainer
from tests.cuda_stand_in import CudaGenerator, cuda_stand_in
from tests.ranks import run_ranks
from tests.tiny import tiny_config, tiny_packs


def _train(config: Config, last: int) -> tuple[list[float], list[float]]:
    """Train from the newest checkpoint to step `last` and save.

    Returns the losses, and numbers drawn then.
    """
    with cuda_stand_in() as generator, parallel_run(config.parallel, seed=1) as topology:
        assert topology.device.type == "cuda"
        trainer, start = build_trainer(config, topology)
        losses = [
            trainer.step(tiny_packs(4, seed=number))["loss"] for number in range(start.step + 1, last + 1)
        ]
        if not start.step:
            _draws(generator)
        trainer.save(Position(last, 4 * last))
        trainer.checkpoints.wait()
        return losses, _draws(generator)


def _draws(generator: CudaGenerator) -> list[float]:
    """Two numbers from the device's generator, and one from the generator that megatron-core tracks."""
    with get_cuda_rng_tracker().fork():
        tracked = generator.draw()
    return [generator.draw(), generator.draw(), tracked]


def _config(run_dir: Path) -> Config:
    return tiny_config(run_dir, train={"steps": 5}, checkpoint={"asynchronous": False})


def test_resumed_losses_equal_those_of_a_run_that_did_not_stop(tmp_path: Path) -> None:
    """megatron-core uses torch's AdamW here. Its step count must not grow by the number of parameters."""
    ((whole, _),) = run_ranks(_train, 1, _config(tmp_path / "whole"), 5)
    ((before, _),) = run_ranks(_train, 1, _config(tmp_path / "run"), 3)
    ((after, _),) = run_ranks(_train, 1, _config(tmp_path / "run"), 5)
    assert before + after == whole


def test_the_generators_of_the_gpu_continue_where_they_were(tmp_path: Path) -> None:
    ((_, expected),) = run_ranks(_train, 1, _config(tmp_path / "run"), 2)
    ((_, actual),) = run_ranks(_train, 1, _config(tmp_path / "run"), 2)
    assert actual == expected and len({*expected}) == 3


def _resumes_on_a_cpu(config: Config) -> int:
    with parallel_run(config.parallel, seed=1) as topology:
        _, start = build_trainer(config, topology)
        with get_cuda_rng_tracker().fork():  # this fails if the state comes from another kind of device
            return start.step


def _saved_on_a_cpu(config: Config) -> None:
    with parallel_run(config.parallel, seed=1) as topology:
        trainer, _ = build_trainer(config, topology)
        trainer.save(Position(2, 8))
        trainer.checkpoints.wait()


def test_a_run_moves_between_a_gpu_and_a_cpu(tmp_path: Path) -> None:
    """A generator's state has 16 bytes on a GPU and 5,056 on a CPU. Both kinds begin at the seed instead."""
    run_ranks(_train, 1, _config(tmp_path / "down"), 2)
    assert run_ranks(_resumes_on_a_cpu, 1, _config(tmp_path / "down")) == [2]
    run_ranks(_saved_on_a_cpu, 1, _config(tmp_path / "up"))
    ((losses, _),) = run_ranks(_train, 1, _config(tmp_path / "up"), 3)
    assert len(losses) == 1
