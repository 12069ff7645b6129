"""A rank knows itself under torchrun, under srun, and alone; a batch script is no rank."""

import pytest

from megatron_post.parallel.environment import rank_from_environment

BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
STEP = {**BATCH, "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        (BATCH, (0, 1, 0)),
        (STEP, (11, 16, 3)),
        (TORCHRUN, (5, 8, 1)),
        ({**STEP, **TORCHRUN}, (5, 8, 1)),  # torchrun as the one task of each node
    ],
)
def test_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int, int]
) -> None:
    for name in (*STEP, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_from_environment() == expected
