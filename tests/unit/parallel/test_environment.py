"""A process finds its rank under torchrun, under srun and alone. A batch script is not a rank."""

import pytest

from megatron_post.parallel.environment import rank_from_environment

BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
STEP = {**BATCH, "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16"}
NODES = {**BATCH, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}  # a task a node
# The shell of `salloc`, if Slurm runs it as a step, or of `srun --pty bash`.
SHELL = {**BATCH, "SLURM_STEP_NUM_TASKS": "1"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
GROUPS = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}


def _enter(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in (*STEP, *TORCHRUN, *GROUPS, *OPEN_MPI, "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0)),
        (BATCH, (0, 1, 0)),
        (STEP, (11, 16, 3)),
        (TORCHRUN, (5, 8, 1)),
        # torchrun is the only task of each node, or a user starts it by hand on some of the allocated nodes.
        ({**NODES, **TORCHRUN, **GROUPS}, (5, 8, 1)),
        ({**BATCH, **TORCHRUN, **GROUPS, "GROUP_WORLD_SIZE": "1"}, (5, 8, 1)),
        ({**SHELL, **TORCHRUN, **GROUPS, "GROUP_WORLD_SIZE": "1"}, (5, 8, 1)),
        (SHELL, (0, 1, 0)),
        # torchrun has lost one of three nodes.
        ({**NODES, **TORCHRUN, **GROUPS, "SLURM_STEP_NUM_TASKS": "3"}, (5, 8, 1)),
        # Another launcher runs on each node, a script copies Slurm's numbers, or a hook of enroot does so.
        ({**NODES, **TORCHRUN}, (5, 8, 1)),
        ({**STEP, "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}, (11, 16, 3)),
        ({**OPEN_MPI, **TORCHRUN}, (5, 8, 1)),
        ({**NODES, **OPEN_MPI, **TORCHRUN}, (5, 8, 1)),  # mpirun starts one daemon per node with srun
        ({"PMI_SIZE": "1", "PMI_RANK": "0", **TORCHRUN}, (5, 8, 1)),
    ],
)
def test_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int, int]
) -> None:
    _enter(monkeypatch, environment)
    assert rank_from_environment() == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        # A batch script runs in a PyTorch container, and srun passes the container's environment on.
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "task 11 of 16 .*RANK=0 and WORLD_SIZE=1"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "16"}, "task 11 of 16 .*RANK=0 and WORLD_SIZE=16"),
        ({**STEP, **TORCHRUN}, "SLURM_STEP_NUM_TASKS=16.*RANK=5 and WORLD_SIZE=8"),
        # torchrun runs on each node without --nnodes.
        (
            {**NODES, **TORCHRUN, **GROUPS, "GROUP_WORLD_SIZE": "1"},
            "task 1 of 2 .*GROUP_WORLD_SIZE=1.*--nnodes=2",
        ),
        # A container keeps only some of Slurm's variables.
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "srun has started .* task 3 of 8 .*SLURM_NTASKS=8"),
        # mpirun does not set RANK.
        (OPEN_MPI, "mpirun has started .* task 5 of 8 .*RANK=0 and WORLD_SIZE=1"),
        ({**NODES, **OPEN_MPI}, "OMPI_COMM_WORLD_SIZE=8.*RANK=1 and WORLD_SIZE=2"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "PMI_SIZE=4.*RANK=0 and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "8"}, r"RANK=\(not set\), WORLD_SIZE=8: a launcher sets both, or neither"),
        ({"RANK": "3"}, r"RANK=3, WORLD_SIZE=\(not set\): a launcher sets both"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "RANK=8, WORLD_SIZE=8"),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, "RANK='-1', which is no number"),
        ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE='many', which is no number"),
    ],
)
def test_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    """In each of these cases the run would hang, or several tasks would train alone in one run directory."""
    _enter(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        rank_from_environment()
