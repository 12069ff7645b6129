"""Each version of Transformer Engine that megatron-core 0.16 is made for takes the keywords that we pass."""

from functools import partial
from typing import Any

import pytest

from megatron_post.doctor import ENGINE_VERSIONS
from tests.distributed.test_layouts import check_equal, gradients, joined
from tests.ranks import run_ranks
from tests.transformer_engine.ranks import VERSION, run_with_transformer_engine
from tests.transformer_engine.stand_in import WHEELS

OTHERS = ["2.9.0", "2.10.0"]
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2 + SP, everything recomputed by itself": (
        2,
        {"tensor": 2, "sequence": True},
        {"recompute": {"mode": "selective", "modules": ["core_attn", "mlp", "layernorm"]}},
    ),
    "CP2, layers recomputed": (2, {"context": 2}, {"recompute": {"mode": "full"}}),
}


def test_no_version_is_forgotten() -> None:
    """`doctor` names the range."""
    (major, first), (_, end) = ENGINE_VERSIONS
    assert [*OTHERS, VERSION] == [f"{major}.{minor}.0" for minor in range(first, end)]


@pytest.fixture(scope="module")
def expected() -> tuple[dict, float, dict]:
    """What one rank of portable layers gives."""
    return joined(run_ranks(gradients, 1, {}, {}))


@pytest.mark.parametrize("version", OTHERS)
def test_older_versions(version: str, expected: tuple[dict, float, dict]) -> None:
    """Modules are made and called as with the newest, which the other tests have."""
    if not (WHEELS / version).is_dir():
        pytest.skip(f"Transformer Engine's pure Python wheel is not in {WHEELS / version}: make install")
    run = partial(gradients, portable=False)
    for world_size, parallel, sections in CASES.values():
        found = run_with_transformer_engine(run, world_size, parallel, sections, version=version)
        check_equal(joined(found), expected)
