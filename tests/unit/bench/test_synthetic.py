"""Random stores that every stage and layout can train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_post.bench.synthetic import write_synthetic
from megatron_post.data.template import TokenRole
from tests.tiny import tiny_config

CASES: dict[str, dict[str, Any]] = {
    "dialogs": {"data": {"pack_length": 256}},
    "CP 2": {"data": {"pack_length": 256}, "parallel": {"context": 2}},
    "pairs": {"stage": "dpo", "data": {"pack_length": 256}},
    "isolated pairs": {"stage": "dpo", "data": {"pack_length": 256}, "dpo": {"layout": "isolated"}},
    "isolated": {"stage": "reward", "data": {"pack_length": 256}},
    "steps": {"stage": "step_reward", "data": {"pack_length": 256}},
    "cut documents": {"stage": "pretrain", "data": {"pack_length": 256}, "parallel": {"context": 2}},
    "whole documents": {
        "stage": "pretrain",
        "data": {"pack_length": 256},
        "pretrain": {"documents": "whole"},
    },
    "whole mix": {"data": {"pack_length": 16384}},
}


@pytest.mark.parametrize("sections", CASES.values(), ids=CASES.keys())
def test_stores_are_full_and_valid(sections: dict[str, Any], tmp_path: Path) -> None:
    """There are about as many packs as requested.

    They are nearly full, with several segments and valid ids.
    """
    config = tiny_config(**sections)
    store = write_synthetic(tmp_path / "store", config, packs=24)
    packs = [store.read(i) for i in range(len(store))]
    assert 16 <= len(packs) <= 36
    assert sum(int(p.lengths.sum()) for p in packs) > 0.8 * len(packs) * config.data.pack_length
    assert max(int(p.tokens.max()) for p in packs) < 250
    assert np.mean([len(p.lengths) for p in packs]) > 3
    trained = sum(int((p.roles >= TokenRole.BODY).sum()) for p in packs)
    assert trained > 0
    multiple = 2 * config.parallel.context if config.parallel.context > 1 else 1
    assert all(not (np.diff(p.cu_seqlens) % multiple).any() for p in packs)
    if config.stage == "dpo":
        assert all(
            p.reference_logps is not None and p.reference_logps[0] == np.float32(-np.log(250)) for p in packs
        )


def test_stores_are_deterministic(tmp_path: Path) -> None:
    one, other = (write_synthetic(tmp_path / name, tiny_config(), packs=4) for name in "ab")
    np.testing.assert_array_equal(one.read(1).tokens, other.read(1).tokens)


def test_packs_too_short_for_pairs_are_refused(tmp_path: Path) -> None:
    config = tiny_config(stage="dpo", data={"pack_length": 16})
    with pytest.raises(ValueError, match="pack_length=16 is too short for pairs"):
        write_synthetic(tmp_path / "store", config, packs=4)
