"""Which rank this process is. Standard library only: what runs before torch is imported may ask too."""

import os
from collections.abc import Mapping

# Launchers that start one process per task: what they call the number of tasks and the task's own number.
_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "an MPI launcher": ("PMI_SIZE", "PMI_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
}


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) that torchrun, or srun with one task per rank, has set; else (0, 1, 0).

    A batch script has SLURM_PROCID and SLURM_NTASKS too, although it is no rank: only a step has
    SLURM_STEP_NUM_TASKS.

    Raises `ValueError` where the variables contradict each other, or contradict the launcher that started
    this process. A RANK and WORLD_SIZE that were inherited would make every task train alone, all in one run
    directory.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = (
        _number(env, name, default) for name, default in zip(names, (0, 1, 0), strict=True)
    )
    if not 0 <= rank < world_size or (world_size > 1 and names[0] not in env):
        said = ", ".join(f"{name}={env.get(name, '(not set)')}" for name in names[:2])
        raise ValueError(f"{said}: a launcher sets both, or neither. Unset them, or correct the launcher")
    _check_launchers(env, rank=rank, world_size=world_size)
    return rank, world_size, local_rank


def _check_launchers(env: Mapping[str, str], *, rank: int, world_size: int) -> None:
    """See that the ranks are those of the tasks that a launcher has started. Raises `ValueError`.

    A task may be torchrun, which starts several ranks and counts the tasks as its groups, or another
    launcher, whose ranks are a multiple of the tasks.
    """
    for launcher, (size_name, rank_name) in _LAUNCHERS.items():
        tasks, task = _number(env, size_name, 0), _number(env, rank_name, 0)
        if launcher == "srun" and size_name not in env and task > 0:
            # a container that has kept only some of Slurm's variables
            size_name, tasks = "SLURM_NTASKS", _number(env, "SLURM_NTASKS", 0)
        if tasks <= 1:
            continue
        if "GROUP_WORLD_SIZE" in env and "RANK" in env:
            # with fewer groups than tasks, but several, torchrun has lost a node and goes on without it
            agrees = 1 < _number(env, "GROUP_WORLD_SIZE", 1) <= tasks
            said = f"torchrun has GROUP_WORLD_SIZE={env['GROUP_WORLD_SIZE']}"
            remedy = f"give torchrun --nnodes={tasks} and one rendezvous"
        else:
            agrees = world_size % tasks == 0 and (world_size > tasks or rank == task)
            said = f"RANK={rank} and WORLD_SIZE={world_size}"
            remedy = "unset RANK and WORLD_SIZE before the ranks start, or set both for each rank"
        if not agrees:
            raise ValueError(
                f"{launcher} has started this process as task {task} of {tasks} ({rank_name}={task}, "
                f"{size_name}={tasks}), but {said}: tasks that do not know each other would each train alone "
                f"in one run directory. {remedy[0].upper()}{remedy[1:]}"
            )


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError(f"the environment has {name}={text!r}, which is no number: unset or correct it")
    return int(text or default)
