"""`megatron-post launch curate` queues the processes of a curation as a Slurm array."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_post.curation.settings import Curation, load_curation, users_of_gpus
from megatron_post.display import say
from megatron_post.launch import slurm
from megatron_post.launch.cluster import CPUS, Cluster, load_cluster, without_gpus
from megatron_post.launch.preflight import raise_for, slurm_findings
from megatron_post.launch.record import active_findings, record_job
from megatron_post.launch.script import Job
from megatron_post.launch.show import show_script
from megatron_post.launch.synthesis import cpu_findings


def launch_curation(
    config_path: str,
    cluster_path: str,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    cpus: int | None = None,
    dry_run: bool = False,
) -> None:
    """Check and queue a curation. If there are findings, raise `ConfigError` with all of them.

    processes: tasks of the Slurm array that share the parts of the rows and the blocks, such as clusters.
    cpus: cores of each task. A task that uses GPUs takes a whole node. dry_run: print the script and only
    check the files.
    """
    settings, cluster = load_curation(config_path, overrides), load_cluster(cluster_path)
    found = [] if cpus is None else cpu_findings(cpus, cluster)
    users = users_of_gpus(settings)
    if users and cpus is not None:
        found.append(f"--cpus has no effect: {users[0]} uses GPUs, so each task takes a whole node")
    if not users:
        cluster = without_gpus(cluster, cpus=cpus or min(CPUS, cluster.cpus_per_node))
    job = Job(
        name="curate",
        command=("curate", "run", config_path, *overrides),
        run_dir=settings.run,
        directory=Path.cwd(),
        ranks_per_node=1,
        array=processes,
    )
    if dry_run:
        say("\n".join(f"# {line}" for line in _plan(settings, users, cluster, processes=processes)))
        say(f"# {slurm.submission(job, cluster)}")
        say(f"#   megatron-post {shlex.join(job.command)}")
        show_script(job, cluster)
        raise_for(found, config_path)
        return
    found += active_findings([settings.run]) + slurm_findings(job, cluster)
    raise_for(found, config_path)
    number = slurm.submit(job, cluster)
    tasks = [f"{number}_{task}" for task in range(processes)]
    recorded = [record_job([job.folder], job, task) for task in tasks]
    many = f" to {tasks[-1]}" if len(tasks) > 1 else ""
    say(f"job {tasks[0]}{many} queued: {job.name}; log {recorded[0].log}")


def _plan(settings: Curation, users: Sequence[str], cluster: Cluster, *, processes: int) -> list[str]:
    gpus = f"a whole node with {cluster.gpus_per_node} GPUs, for {', '.join(users)}" if users else "no GPU"
    return [
        f"processes that share the rows: {processes}, with the columns in {settings.run}",
        f"each process: {gpus}",
        "each takes the work that no other has taken, so they may start and end at different times",
    ]
