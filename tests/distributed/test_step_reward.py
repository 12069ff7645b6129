"""The reward model of steps in every layout, against one rank and a loop in float64 over `transformers`."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_post.config.schema import Config
from megatron_post.convert.hf_config import to_hf_config
from megatron_post.convert.hf_reader import RandomWeights, load_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.convert.mapping import hf_shapes
from megatron_post.data.pack import pack_of_segments
from megatron_post.data.template import STEP_ROLES, Rendered, TokenRole
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper
from tests.comparisons import PACK_LENGTH
from tests.distributed.gradients import gather_shards
from tests.ranks import run_ranks
from tests.tiny import tiny_config

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 + VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "TP2 x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}),
}
HEAD = {"scalar_head": True, "scores_steps": True}
WEIGHTS = 3  # their seed
BIAS = 0.4  # a bias of 0 would hide a bias that is added twice


def _solutions(count: int) -> list[Rendered]:
    """Solutions of random tokens with 1 to 6 steps of 1 to 5 tokens. About a third are unlabelled."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(count):
        roles = [TokenRole.HEADER] + [TokenRole.PROMPT] * int(rng.integers(3, 9))
        for step in range(int(rng.integers(1, 7))):
            # The first step of every solution has a label, so that no solution is without one.
            label = int(rng.integers(0, 2 if step == 0 else 3))
            roles += [TokenRole.BODY] * int(rng.integers(0, 5)) + [[*STEP_ROLES, TokenRole.BODY][label]]
        roles += [TokenRole.TERMINATOR]
        tokens = rng.integers(3, 250, len(roles)).astype(np.int32)
        made.append(Rendered(tokens, np.array(roles, dtype=np.uint8)))
    return made


SOLUTIONS = _solutions(12)
COUNT = sum(int(np.isin(solution.roles, STEP_ROLES).sum()) for solution in SOLUTIONS)


def _config(parallel: dict[str, Any]) -> Config:
    return tiny_config(stage="step_reward", data={"pack_length": PACK_LENGTH}, parallel=parallel)


class WithBias(RandomWeights):
    """Random weights with a bias that is not 0."""

    def read(self, name: str, dim: int | None, start: int, end: int) -> torch.Tensor:
        found = super().read(name, dim, start, end)
        return torch.full_like(found, BIAS) if name == "score.bias" else found


def _step(config: Config, counts: list[int]) -> tuple[dict, dict]:
    """Metrics and gradients of one step over the solutions, packed as `counts`."""
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology, portable=True)
        load_weights(models, WithBias(config.model, seed=WEIGHTS, **HEAD), config.model)
        chunks = wrap_data_parallel(models, config, topology)
        optimizer = build_optimizer(chunks, config)
        stepper = Stepper(chunks, make_stage(config, topology), topology, portable=True)
        starts = np.cumsum([0, *counts])
        packs = [
            pack_of_segments(SOLUTIONS[a:b], pack_length=PACK_LENGTH, segment_multiple=4)
            for a, b in pairwise(starts)
        ]
        metrics = stepper(packs[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        for chunk in chunks:
            gather_shards(chunk)
        found = gathered_tensors(unwrap_model(chunks), config.model, value_of=lambda p: p.main_grad.clone())
        return metrics, {name: gradient.numpy() for name, gradient in found}


def _run(world_size: int, parallel: dict[str, Any], counts: list[int]) -> tuple[dict, dict]:
    results = run_ranks(_step, world_size, _config(parallel), counts)
    metrics = next(m for m, _ in reversed(results) if m)
    return metrics, {name: g for _, part in results for name, g in part.items()}


@pytest.fixture(scope="module")
def one_rank() -> tuple[dict, dict]:
    return _run(1, {}, [3, 9])


@pytest.fixture(scope="module")
def float64() -> tuple[dict, dict]:
    """Sums and gradients by a loop over solutions and steps, without packs and masks."""
    model_config = _config({}).model
    values = to_hf_config(model_config, dtype="float64", bos_id=1, eos_ids=[2], pad_id=None, **HEAD)
    model = transformers.LlamaForTokenClassification(transformers.LlamaConfig(**values)).double()
    weights = WithBias(model_config, seed=WEIGHTS, **HEAD)
    names = hf_shapes(model_config, **HEAD)
    model.load_state_dict({name: weights.read(name, None, 0, 0).double() for name in names})
    sums: dict[str, Any] = dict.fromkeys(("loss", "accuracy", "accuracy_wrong", "brier"), 0.0)
    for solution in SOLUTIONS:
        logits = model(torch.from_numpy(solution.tokens).long()[None]).logits[0, :, 0]
        for place, role in enumerate(solution.roles.tolist()):
            if role not in STEP_ROLES:
                continue
            right = role == TokenRole.RIGHT_STEP
            probability = torch.sigmoid(logits[place])
            sums["loss"] += -torch.log(probability if right else 1 - probability)
            sums["accuracy"] += float((logits[place] > 0) == right)
            sums["accuracy_wrong"] += float(not right and logits[place] < 0)
            sums["brier"] += float((probability - float(right)) ** 2)
    (sums["loss"] / COUNT).backward()
    return sums, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def _assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict], *, tolerance: float) -> None:
    (metrics, gradients), (sums, wanted) = found, expected
    assert metrics["loss_count"] == metrics["accuracy_count"] == COUNT
    for name, value in sums.items():
        assert metrics[name] == pytest.approx(float(value), rel=tolerance), name
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - wanted[name]) <= tolerance * np.linalg.norm(wanted[name]), name


def test_one_rank_equals_a_loop_in_float64(one_rank: tuple, float64: tuple) -> None:
    """The error of an fp32 gradient through four layers and back is 1e-5, as for the other stages."""
    _assert_equal(one_rank, float64, tolerance=2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_rank(name: str, one_rank: tuple) -> None:
    world_size, parallel = LAYOUTS[name]
    _assert_equal(_run(world_size, parallel, [3, 9]), one_rank, tolerance=1e-5)


@pytest.mark.parametrize("counts", [[6, 6], [1, 4, 4, 3]])
def test_every_step_has_the_same_weight(counts: list[int], one_rank: tuple) -> None:
    """A pack with few steps does not weigh as much as one with many."""
    _assert_equal(_run(1, {}, counts), one_rank, tolerance=1e-5)


def _scores(config: Config) -> np.ndarray:
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology)
        load_weights(models, WithBias(config.model, seed=WEIGHTS, **HEAD), config.model)
        stage: Any = make_stage(config, topology)
        pack = pack_of_segments(SOLUTIONS, pack_length=PACK_LENGTH, segment_multiple=4)
        ((output, batch),) = Stepper(models, stage, topology, portable=True).outputs([pack])
        with torch.no_grad():
            return stage.scores(output, batch).numpy()


def test_scores_of_context_parallel_ranks_add_up() -> None:
    """Each rank has the scores of its own tokens, in the places of the whole pack."""
    (whole,) = run_ranks(_scores, 1, _config({}))
    parts = run_ranks(_scores, 2, _config({"context": 2}))
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)
    assert all(np.count_nonzero(part) == PACK_LENGTH // 2 for part in parts)
