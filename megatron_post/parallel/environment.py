"""The rank of this process. Only the standard library is used, so code may ask before torch is imported."""

import os
from collections.abc import Mapping

# Launchers that start one process per task, and their variables for the number of tasks and the task's
# number.
_LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "an MPI launcher": ("PMI_SIZE", "PMI_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
}


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as set by torchrun or by srun with one task per rank. Else (0, 1, 0).

    A batch script is not a rank, although it has SLURM_PROCID and SLURM_NTASKS. Only a job step has
    SLURM_STEP_NUM_TASKS.

    Raises `ValueError` if the variables contradict each other or the launcher that started this process. With
    an inherited RANK and WORLD_SIZE every task would train alone, and all would write to one run directory.
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
        values = ", ".join(f"{name}={env.get(name, '(not set)')}" for name in names[:2])
        raise ValueError(f"{values}: a launcher sets both, or neither. Unset them, or correct the launcher")
    _check_launchers(env, rank=rank, world_size=world_size)
    return rank, world_size, local_rank


def share_of(rank: int | None, size: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """The given rank and size. By default they are those of the task of a Slurm array, or (0, 1).

    Raises `ValueError` if only one is given, or if the rank is not in the range of the size.
    """
    if rank is None and size is None:
        task, count = (environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT"))
        if not (task.isdigit() and count.isdigit()):
            return 0, 1
        rank, size = int(task) - int(environment.get("SLURM_ARRAY_TASK_MIN", "0")), int(count)
        if rank >= size:
            raise ValueError(f"SLURM_ARRAY_TASK_ID={task}: give --rank and --size for an array with gaps")
    if rank is None or size is None:
        raise ValueError("give --rank and --size together")
    if not 0 <= rank < size:
        raise ValueError(f"--rank {rank} --size {size}: ranks are 0 to size - 1")
    return rank, size


def _check_launchers(env: Mapping[str, str], *, rank: int, world_size: int) -> None:
    """Check that the ranks fit the tasks that a launcher has started. Raises `ValueError`.

    A task may be torchrun, which starts several ranks and counts the tasks as its groups. It may also be
    another launcher. The number of its ranks is then a multiple of the number of tasks.
    """
    for launcher, (size_name, rank_name) in _LAUNCHERS.items():
        tasks, task = _number(env, size_name, 0), _number(env, rank_name, 0)
        if launcher == "srun" and size_name not in env and task > 0:
            # A container may keep only some of Slurm's variables.
            size_name, tasks = "SLURM_NTASKS", _number(env, "SLURM_NTASKS", 0)
        if tasks <= 1:
            continue
        if "GROUP_WORLD_SIZE" in env and "RANK" in env:
            # Fewer groups than tasks, but more than one, mean that torchrun lost a node and goes on without
            # it.
            agrees = 1 < _number(env, "GROUP_WORLD_SIZE", 1) <= tasks
            found = f"torchrun has GROUP_WORLD_SIZE={env['GROUP_WORLD_SIZE']}"
            remedy = f"give torchrun --nnodes={tasks} and one rendezvous"
        else:
            agrees = world_size % tasks == 0 and (world_size > tasks or rank == task)
            found = f"RANK={rank} and WORLD_SIZE={world_size}"
            remedy = "unset RANK and WORLD_SIZE before the ranks start, or set both for each rank"
        if not agrees:
            raise ValueError(
                f"{launcher} has started this process as task {task} of {tasks} ({rank_name}={task}, "
                f"{size_name}={tasks}), but {found}. Each task would train alone, and all would write to one "
                f"run directory. {remedy[0].upper()}{remedy[1:]}"
            )


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError(f"the environment has {name}={text!r}, which is no number: unset or correct it")
    return int(text or default)
