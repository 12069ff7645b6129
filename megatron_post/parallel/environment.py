"""Which rank this process is. Standard library only: what runs before torch is imported may ask too."""

import os


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) that torchrun, or srun with one task per rank, has set; else (0, 1, 0).

    A batch script has SLURM_PROCID and SLURM_NTASKS too, although it is no rank: only a step has
    SLURM_STEP_NUM_TASKS.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
