"""A rank knows itself under torchrun, under srun, and alone; a batch script is no rank."""

import pytest

from megatron_post.parallel.environment import rank_from_environment

BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
STEP = {**BATCH, "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16"}
NODES = {**BATCH, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}  # a task a node
# the shell of `salloc` where Slurm runs it as a step, and `srun --pty bash`
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
        # torchrun as the one task of each node; started by hand in an allocation of more nodes than it uses
        ({**NODES, **TORCHRUN, **GROUPS}, (5, 8, 1)),
        ({**BATCH, **TORCHRUN, **GROUPS, "GROUP_WORLD_SIZE": "1"}, (5, 8, 1)),
        ({**SHELL, **TORCHRUN, **GROUPS, "GROUP_WORLD_SIZE": "1"}, (5, 8, 1)),
        (SHELL, (0, 1, 0)),
        # three nodes, of which torchrun has lost one
        ({**NODES, **TORCHRUN, **GROUPS, "SLURM_STEP_NUM_TASKS": "3"}, (5, 8, 1)),
        # another launcher on each node; a script that copies Slurm's numbers; enroot's hook in each task
        ({**NODES, **TORCHRUN}, (5, 8, 1)),
        ({**STEP, "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}, (11, 16, 3)),
        ({**OPEN_MPI, **TORCHRUN}, (5, 8, 1)),
        ({**NODES, **OPEN_MPI, **TORCHRUN}, (5, 8, 1)),  # mpirun starts a daemon a node with srun
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
        # a batch script in a container of PyTorch, whose environment srun has handed on
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "task 11 of 16 .*RANK=0 and WORLD_SIZE=1"),
        ({**STEP, "RANK": "0", "WORLD_SIZE": "16"}, "task 11 of 16 .*RANK=0 and WORLD_SIZE=16"),
        ({**STEP, **TORCHRUN}, "SLURM_STEP_NUM_TASKS=16.*RANK=5 and WORLD_SIZE=8"),
        # torchrun on each node, without --nnodes
        (
            {**NODES, **TORCHRUN, **GROUPS, "GROUP_WORLD_SIZE": "1"},
            "task 1 of 2 .*GROUP_WORLD_SIZE=1.*--nnodes=2",
        ),
        # a container that hands on only some of Slurm's variables
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, "srun has started .* task 3 of 8 .*SLURM_NTASKS=8"),
        # mpirun, which sets no RANK
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
    """Each of these would hang, or train alone beside others in one run directory."""
    _enter(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        rank_from_environment()
