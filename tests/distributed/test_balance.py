"""Two data-parallel ranks whose packs are balanced take the same step as ranks with packs in plain order."""

from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.utils import unwrap_model

from megatron_post.convert.hf_reader import load_weights, open_weights
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.data.balance import squares
from megatron_post.data.loader import PackLoader, pack_indices
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import SourceCounts, StoreSettings
from megatron_post.data.store_writer import StoreWriter
from megatron_post.models.build import build_model
from megatron_post.parallel.topology import Topology, parallel_run
from megatron_post.stages.sft import SFT
from megatron_post.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_post.train.step import Stepper
from tests.distributed.gradients import gather_shards
from tests.ranks import run_ranks
from tests.tiny import PACK_LENGTH, tiny_config, tiny_packs

BATCH, SEED = 8, 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of twelve tiny packs, each with 3 to 5 segments of unequal lengths."""
    path = tmp_path_factory.mktemp("balance") / "store"
    packs = tiny_packs(12)
    segments = [len(pack.lengths) for pack in packs]
    padded = np.concatenate([np.diff(pack.cu_seqlens) for pack in packs])
    plain = np.zeros(len(padded))
    columns = {
        "padded": padded,
        "length": np.concatenate([pack.lengths for pack in packs]),
        "source": plain,
        "sample": np.arange(len(padded)),
        "unit": np.arange(len(padded)),
        "rank": plain - 1,
        "turns": plain,
        "response": plain,
    }
    settings = StoreSettings(
        pack_length=PACK_LENGTH, segment_multiple=1, tokenizer_fingerprint="f", pad_id=0, seed=0
    )
    with StoreWriter(path, settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("tiny", rows=len(padded))],
            columns=columns,
            segments_per_pack=segments,
            packs=((pack.tokens, pack.roles) for pack in packs),
        )
    return path


def _numbers(store: PackStore, topology: Topology, *, balanced: bool) -> list[int]:
    """This rank's packs of the first step, from the loader or as every other pack of the stream."""
    if not balanced:
        stream = pack_indices(len(store), seed=SEED, start=0)
        return list(islice(stream, BATCH))[topology.data_rank :: topology.data_size]
    with PackLoader(
        store,
        seed=SEED,
        global_batch=BATCH,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
    ) as loader:
        packs = next(loader)
    stored = [store.read(number).tokens.tobytes() for number in range(len(store))]
    return [stored.index(pack.tokens.tobytes()) for pack in packs]


def _steps(path: str) -> list[dict[str, Any]]:
    """Take one step in plain order and one balanced. Returns metrics, gradient norm, gradients and packs."""
    config = tiny_config()
    store = open_store(path, "train")
    with parallel_run(config.parallel, seed=1) as topology:
        found = []
        for balanced in (False, True):
            numbers = _numbers(store, topology, balanced=balanced)
            models = build_model(config, topology)
            load_weights(models, open_weights(config.model, seed=3), config.model)
            chunks = wrap_data_parallel(models, config, topology)
            optimizer = build_optimizer(chunks, config)
            stepper = Stepper(chunks, SFT(config.loss.trained_roles), topology, portable=True)
            metrics = stepper([store.read(number) for number in numbers])
            optimizer.prepare_grads()
            norm = optimizer.get_grad_norm()
            for chunk in chunks:
                gather_shards(chunk)
            gradients = gathered_tensors(
                unwrap_model(chunks), config.model, value_of=lambda p: p.main_grad.clone()
            )
            arrays = {name: value.numpy() for name, value in gradients}
            found.append({"numbers": numbers, "metrics": metrics, "norm": norm, "gradients": arrays})
        return found


def test_balanced_ranks_take_the_same_step(store: Path) -> None:
    """The ranks have the same eight packs in another distribution, and the fuller rank has less work.

    Loss, gradient norm and every gradient agree as fp32 sums in another order do (see test_layouts).
    """
    plain, balanced = zip(*run_ranks(_steps, 2, str(store)), strict=True)
    dealt = [[rank["numbers"] for rank in ranks] for ranks in (plain, balanced)]
    assert sorted(chain(*dealt[0])) == sorted(chain(*dealt[1]))
    assert [set(packs) for packs in dealt[0]] != [set(packs) for packs in dealt[1]]
    costs = squares(open_store(store, "train"), np.arange(12))
    fullest = [max(costs[packs].sum() for packs in ranks) for ranks in dealt]
    assert fullest[1] < fullest[0]
    for expected, found in zip(plain, balanced, strict=True):
        assert found["metrics"]["loss_count"] == expected["metrics"]["loss_count"] > 100
        assert found["metrics"]["loss"] == pytest.approx(expected["metrics"]["loss"], rel=1e-5)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, value in found["gradients"].items():
            error = np.linalg.norm(value - expected["gradients"][name])
            assert error <= 1e-5 * np.linalg.norm(expected["gradients"][name]), name
    assert any(rank["gradients"] for rank in balanced)
