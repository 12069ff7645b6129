"""Where the host waits for the GPU in a step: nowhere while packs are prepared, and never for the update."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_post.config.schema import Config
from megatron_post.data.batch import on_device
from megatron_post.data.pack import Pack
from megatron_post.parallel.topology import Topology
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.train.parts import build_trainer, make_stage
from megatron_post.train.step import Stepper
from tests.comparisons import examples, packs
from tests.tiny import tiny_config, tiny_packs
from tests.waits import DEVICE, device_as_cuda, no_waits, recorded_reads, without_gloo

KINDS = ("sft", "dpo", "dpo, isolated", "separate", "isolated", "concatenated")


@pytest.fixture
def topology() -> Iterator[Topology]:
    """Context-parallel rank 1 of 2, whose GPU holds no values."""
    parallel = tiny_config(parallel={"context": 2}).parallel
    with fake_rank(parallel, rank=1, world_size=2) as found:
        yield dataclasses.replace(found, device=DEVICE)


def _config(kind: str, run_dir: str | Path = "unused", **sections: dict[str, Any]) -> Config:
    stage = kind if kind in ("sft", "dpo") else "reward"
    if kind == "dpo, isolated":
        stage, sections["dpo"] = "dpo", {"layout": "isolated"}
    if stage == "reward":
        sections["reward"] = {"layout": kind}
    return tiny_config(run_dir, stage=stage, **sections)


def _pack(kind: str) -> Pack:
    if kind == "sft":
        return tiny_packs(1)[0]
    layouts = {"isolated": "isolated", "concatenated": "isolated", "dpo, isolated": "isolated_pairs"}
    layout = layouts.get(kind, "separate")
    pack = packs(examples(4), counts=[4], layout=layout)[0]
    return dataclasses.replace(pack, reference_logps=torch.zeros(len(pack.tokens)).numpy())


def _copied_ahead(pack: Pack) -> Pack:
    """As the DALI loader hands over a pack."""
    moved: Any = torch.as_tensor(pack.tokens).to(DEVICE)
    return dataclasses.replace(pack, tokens=moved)


@pytest.mark.parametrize("is_ahead", [False, True], ids=["arrays", "on the GPU"])
@pytest.mark.parametrize("portable", [False, True], ids=["Transformer Engine", "portable"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_prepared_without_waiting(
    topology: Topology, kind: str, portable: bool, is_ahead: bool
) -> None:
    stepper = Stepper(
        [], make_stage(_config(kind, parallel={"context": 2}), topology), topology, portable=portable
    )
    pack = _copied_ahead(_pack(kind)) if is_ahead else _pack(kind)
    with no_waits():
        microbatch = stepper.prepare(pack)
    parts: tuple[Any, ...] = (microbatch.batch, microbatch.trained)
    assert not [f.name for part in parts for f in dataclasses.fields(part) if _is_on_host(part, f)]


def _is_on_host(part: Any, field: Any) -> bool:
    value = getattr(part, field.name)
    return isinstance(value, torch.Tensor) and value.device != DEVICE


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.to(DEVICE),
        lambda x: x.to(DEVICE, non_blocking=True),
        lambda x: x.pin_memory().to(DEVICE),
        lambda x: torch.zeros(4, device=DEVICE)[x],
        lambda x: bool(on_device(x, DEVICE).any()),
        lambda x: on_device(x, DEVICE).tolist(),
        lambda x: on_device(x, DEVICE).nonzero(),
    ],
)
def test_every_kind_of_wait_is_noticed(wait: Any) -> None:
    with no_waits(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(torch.arange(3))


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("sft", {}),
        ("dpo", {"dpo": {"reference": "frozen"}}),
        ("isolated", {"recompute": {"mode": "full"}}),
        ("separate", {"optimizer": {"overlap": True, "clip_grad": 0.0}}),
        ("concatenated", {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp"]}}),
    ],
)
def test_the_waits_of_a_step(tmp_path: Path, kind: str, sections: dict[str, Any]) -> None:
    """A step reads five results. None of them comes after the update, which runs beside the next step."""
    config = _config(kind, tmp_path, **sections)
    pack = _pack(kind)
    with fake_rank(config.parallel, rank=0, world_size=1) as topology, without_gloo(), device_as_cuda():
        trainer, _ = build_trainer(config, dataclasses.replace(topology, device=DEVICE))
        with no_waits(), recorded_reads() as reads:
            trainer.guard.begin(1, "data")
            values = trainer.step([pack, pack])
            trainer.report(1, values, [pack, pack], seconds=0.5)
    assert reads == [
        "finalize_model_grads",  # megatron-core looks whether there was a token
        "_reduce",  # losses
        "get_grad_norm_fp32",  # before it is decided whether to update
        "gather_statuses",
        "get_grad_norm_fp32",  # megatron-core reads the norm again to clip
    ]
