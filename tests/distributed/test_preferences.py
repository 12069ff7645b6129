"""The reward model and DPO in every layout, against loops in float64 over `transformers`."""

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
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import parallel_run
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Stepper
from tests.comparisons import PACK_LENGTH, dpo_by_hand, examples, packs, ranking_by_hand
from tests.distributed.gradients import gather_shards
from tests.ranks import run_ranks
from tests.tiny import tiny_config

transformers = pytest.importorskip("transformers")

LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2 + SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2": (2, {}),
    "TP2 x CP2 x PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2, "sequence": True}),
}
POLICY, REFERENCE = 3, 4  # seeds of the weights
PAIRS = examples(12)
RANKED = examples(12, sizes=(3, 2, 2))


def preference_config(stage: str, parallel: dict[str, Any], **sections: Any) -> Config:
    values = {"data": {"pack_length": PACK_LENGTH}, "parallel": parallel, **sections}
    return tiny_config(stage=stage, **values)


def step(
    config: Config, counts: list[int], layout: str, *, portable: bool = True
) -> tuple[dict, float, dict]:
    """Metrics, gradient norm and gradients of one step over 12 examples packed as `counts`."""
    scalar = config.stage == "reward"
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology, portable=portable)
        load_weights(models, RandomWeights(config.model, seed=POLICY, scalar_head=scalar), config.model)
        reference = None
        if not scalar:
            reference = build_model(config, topology, portable=portable)
            load_weights(reference, RandomWeights(config.model, seed=REFERENCE), config.model)
        chunks = wrap_data_parallel(models, config, topology)
        optimizer = build_optimizer(chunks, config)
        stage = make_stage(config, topology)
        own_attention = portable or config.shares_prompts
        stepper = Stepper(chunks, stage, topology, portable=own_attention, reference=reference)
        made = packs(RANKED if scalar else PAIRS, counts=counts, layout=layout)
        metrics = stepper(made[topology.data_rank :: topology.data_size])
        optimizer.prepare_grads()
        norm = optimizer.get_grad_norm()
        for chunk in chunks:
            gather_shards(chunk)
        found = gathered_tensors(unwrap_model(chunks), config.model, value_of=lambda p: p.main_grad.clone())
        return metrics, norm, {name: g.numpy() for name, g in found}


def _run(world_size: int, config: Config, counts: list[int], layout: str) -> tuple[dict, dict]:
    results = run_ranks(step, world_size, config, counts, layout)
    metrics = next(m for m, _, _ in reversed(results) if m)
    return metrics, {name: g for _, _, part in results for name, g in part.items()}


def _float64(config: Config, seed: int) -> Any:
    scalar = config.stage == "reward"
    values = to_hf_config(
        config.model, dtype="float64", bos_id=1, eos_ids=[2], pad_id=None, scalar_head=scalar
    )
    kind = transformers.LlamaForSequenceClassification if scalar else transformers.LlamaForCausalLM
    model = kind(transformers.LlamaConfig(**values)).double()
    weights = RandomWeights(config.model, seed=seed, scalar_head=scalar)
    names = hf_shapes(config.model, scalar_head=scalar)
    model.load_state_dict({name: weights.read(name, None, 0, 0).double() for name in names})
    return model


@pytest.fixture(scope="module")
def dpo_float64() -> tuple[dict, dict]:
    config = preference_config("dpo", {})
    policy, reference = _float64(config, POLICY), _float64(config, REFERENCE)
    sums = dpo_by_hand(policy, reference, PAIRS, config.dpo)
    (sums["loss"] / len(PAIRS)).backward()
    return sums, {name: p.grad.numpy() for name, p in policy.named_parameters()}


@pytest.fixture(scope="module")
def reward_float64() -> tuple[dict, dict]:
    model = _float64(preference_config("reward", {}), POLICY)
    sums = ranking_by_hand(model, RANKED)
    (sums["loss"] / len(RANKED)).backward()
    return sums, {name: p.grad.numpy() for name, p in model.named_parameters()}


def _assert_equal(found: tuple[dict, dict], expected: tuple[dict, dict], *, count: int) -> None:
    """Compare fp32 with float64, with a tolerance of 5e-5 for gradients.

    fp32 sums of ten log-probabilities of about 5 have an error of 1e-6, which becomes 1e-5 through four
    layers and back. A token, pair or rank that is counted twice exceeds the tolerance.
    """
    (metrics, gradients), (sums, wanted) = found, expected
    assert metrics["loss_count"] == count
    for name, value in sums.items():
        assert metrics[name] == pytest.approx(float(value), rel=2e-5, abs=1e-4), name
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - wanted[name]) <= 5e-5 * np.linalg.norm(wanted[name]), name


@pytest.mark.parametrize("name", LAYOUTS)
def test_dpo(name: str, dpo_float64: tuple[dict, dict]) -> None:
    world_size, parallel = LAYOUTS[name]
    found = _run(world_size, preference_config("dpo", parallel), [2, 10], "separate")
    _assert_equal(found, dpo_float64, count=12)


@pytest.mark.parametrize("name", [*LAYOUTS, "PP2 x VPP2"])
def test_dpo_isolated(name: str, dpo_float64: tuple[dict, dict]) -> None:
    """Both responses share one prompt. Loss, metrics and gradients are those of a row for each response."""
    world_size, parallel = LAYOUTS.get(name, (2, {"pipeline": 2, "virtual_pipeline": 2}))
    config = preference_config("dpo", parallel, dpo={"layout": "isolated"})
    _assert_equal(_run(world_size, config, [3, 9], "isolated_pairs"), dpo_float64, count=12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reward_isolated(name: str, reward_float64: tuple[dict, dict]) -> None:
    """Responses share one prompt and do not see each other. Loss and gradients are those of separate rows."""
    world_size, parallel = LAYOUTS[name]
    found = _run(world_size, preference_config("reward", parallel), [3, 9], "isolated")
    _assert_equal(found, reward_float64, count=12)


@pytest.mark.parametrize("name", ["one rank", "CP2", "TP2 + SP"])
def test_reward_separate(name: str, reward_float64: tuple[dict, dict]) -> None:
    world_size, parallel = LAYOUTS[name]
    config = preference_config("reward", parallel, reward={"layout": "separate"})
    _assert_equal(_run(world_size, config, [5, 7], "separate"), reward_float64, count=12)


@pytest.mark.parametrize(
    ("world_size", "parallel", "counts"),
    [(1, {}, [6, 6]), (1, {}, [1, 4, 4, 3]), (4, {}, [2, 1, 6, 3]), (4, {"context": 2}, [1, 11])],
)
def test_every_pair_has_the_same_weight(
    world_size: int, parallel: dict, counts: list[int], dpo_float64: tuple
) -> None:
    """The packing of the twelve pairs and the number of ranks and microbatches do not matter."""
    found = _run(world_size, preference_config("dpo", parallel), counts, "separate")
    _assert_equal(found, dpo_float64, count=12)


def _first_loss(config: Config) -> dict[str, float]:
    with parallel_run(config.parallel, seed=1) as topology:
        policy, reference = (build_model(config, topology) for _ in range(2))
        for model in (policy, reference):
            load_weights(model, RandomWeights(config.model, seed=POLICY), config.model)
        stepper = Stepper(policy, make_stage(config, topology), topology, portable=True, reference=reference)
        made = packs(PAIRS, counts=[2, 10], layout="separate")
        return stepper(made[topology.data_rank :: topology.data_size], forward_only=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_step_is_ln_2(name: str) -> None:
    """With policy = reference the loss is ln 2 + 0.2 NLL to 1e-6, and the margin is 0."""
    world_size, parallel = LAYOUTS[name]
    results = run_ranks(_first_loss, world_size, preference_config("dpo", parallel))
    metrics = next(m for m in reversed(results) if m)
    assert metrics["loss"] / 12 == pytest.approx(np.log(2) + 0.2 * metrics["nll"] / 12, abs=1e-6)
    assert metrics["margin"] == 0 and metrics["kl"] == 0


def test_concatenated_sees_earlier_responses() -> None:
    """In the Llama 3 report's approximation a response also sees the responses before it in its row.

    The first response of each row has the same score as alone, and the second has another score.
    """
    config = preference_config("reward", {}, reward={"layout": "concatenated"})
    (scores,) = run_ranks(_scores, 1, config)
    ((alone),) = run_ranks(_scores, 1, preference_config("reward", {}))
    np.testing.assert_allclose(scores[1], alone[1], atol=1e-5)
    assert abs(scores[2] - alone[2]) > 1e-3


def _scores(config: Config) -> np.ndarray:
    with parallel_run(config.parallel, seed=1) as topology:
        models = build_model(config, topology)
        load_weights(models, RandomWeights(config.model, seed=POLICY, scalar_head=True), config.model)
        stage: Any = make_stage(config, topology)
        stepper = Stepper(models, stage, topology, portable=True)
        ((output, batch),) = stepper.outputs(packs(RANKED, counts=[12], layout=config.reward.layout))
        with torch.no_grad():
            return stage.scores(output, batch).numpy()
