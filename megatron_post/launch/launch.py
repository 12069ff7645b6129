"""`megatron-post launch` reads and checks the config and the cluster file, and queues or prints the jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_post.config.chain import Chain
from megatron_post.config.load import ConfigError, load_config
from megatron_post.config.schema import Config
from megatron_post.display import say
from megatron_post.launch import slurm
from megatron_post.launch.allocation import chained_jobs
from megatron_post.launch.chain import chain_findings, command_findings, job_table, submit_chain
from megatron_post.launch.cluster import Cluster, load_cluster
from megatron_post.launch.gpu_hours import hours_table, step_hours
from megatron_post.launch.placement import fewest_nodes, place
from megatron_post.launch.preflight import findings, layout_findings, raise_for, slurm_findings
from megatron_post.launch.record import active_findings, record_job
from megatron_post.launch.script import Job
from megatron_post.launch.show import show_script


def launch_run(
    config_path: str,
    cluster_path: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    name: str | None = None,
    dry_run: bool = False,
) -> None:
    """Check and queue a training run. If there are findings, raise `ConfigError` with all of them.

    dry_run: print the script and the placement, and check the config against the cluster file only.
    """
    config, cluster, job = planned_run(config_path, cluster_path, overrides, nodes=nodes, name=name)
    if dry_run:
        show_script(job, cluster)
        raise_for(layout_findings(config, cluster, nodes=job.nodes), config_path)
        placement = place(config.parallel, nodes=job.nodes, ranks_per_node=cluster.ranks)
        say("\n".join(f"# {line}" for line in placement.summary()))
        return
    raise_for([*findings(config, job, cluster), *active_findings([config.run_dir])], config_path)
    job_id = slurm.submit(job, cluster)
    submitted = record_job([job.folder], job, job_id)
    say(f"job {job_id} queued: {job.nodes} nodes x {cluster.ranks} ranks; log {submitted.log}")


def planned_run(
    config_path: str,
    cluster_path: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    name: str | None = None,
) -> tuple[Config, Cluster, Job]:
    """The config, cluster and job of a run. Raises one `ConfigError` with the errors of both files."""
    errors: list[str] = []
    try:
        config = load_config(config_path, overrides)
    except ConfigError as error:
        errors.append(str(error))
    try:
        cluster = load_cluster(cluster_path)
    except ConfigError as error:
        errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))
    job = Job(
        name=name or config.run_dir,
        command=("train", config_path, *overrides),
        run_dir=config.run_dir,
        directory=Path.cwd(),
        nodes=nodes or fewest_nodes(config.parallel, ranks_per_node=cluster.ranks),
    )
    return config, cluster, job


def launch_chain(
    chain: Chain, cluster_path: str, *, origin: str, program: Any, dry_run: bool = False
) -> None:
    """Check and queue a chain of jobs. `origin` names the chain in errors. `program`: as `command_findings`.

    The data of later steps do not exist yet, so only layouts, memory, disks and Slurm's limits are checked.

    dry_run: print the jobs in order, their GPU-hours and the script of the first one, without calling Slurm.
    """
    cluster = load_cluster(cluster_path)
    jobs = chained_jobs(chain, cluster, Path.cwd())
    found = command_findings(chain, program)
    found += chain_findings(chain, jobs, cluster, Path.cwd(), disks=not dry_run)
    if dry_run:
        lines = [*job_table(jobs), "", *hours_table(step_hours(jobs, Path.cwd()))]
        say("\n".join(f"# {line}".rstrip() for line in lines))
        say("# This is the script of the first job. The scripts of the others differ in their settings.")
        show_script(jobs[0].job, jobs[0].cluster)
        raise_for(found, origin)
        return
    of_tasks = (run_dir for each in jobs for _, run_dir in each.job.tasks)
    found += active_findings({chain.run_dir, *(each.job.run_dir for each in jobs), *of_tasks})
    found += [
        f"step {each.job.name!r}: {text}" for each in jobs for text in slurm_findings(each.job, each.cluster)
    ]
    raise_for(found, origin)
    for submitted in submit_chain(chain, cluster, Path.cwd()):
        after = f", after {', '.join(map(str, submitted.after))}" if submitted.after else ""
        say(f"job {submitted.job_id} queued: {submitted.name}{after}; log {submitted.log}")
