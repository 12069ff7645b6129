"""`megatron-post launch synthesize` queues the processes of a recipe and the servers of its models."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_post.config.load import ConfigError
from megatron_post.display import say
from megatron_post.inference.settings import gpus_of
from megatron_post.launch import slurm
from megatron_post.launch.cluster import CPUS, Cluster, load_cluster, without_gpus
from megatron_post.launch.preflight import raise_for, slurm_findings
from megatron_post.launch.record import active_findings, record_job
from megatron_post.launch.script import Job, JobId
from megatron_post.launch.show import show_script
from megatron_post.synthesis.recipe import Recipe, load_recipe
from megatron_post.synthesis.serving import clear_servers, server_key
from megatron_post.synthesis.settings import Synthesis, load_synthesis, recipe_settings


@dataclass(frozen=True)
class _Planned:
    """A job with the cluster settings for it."""

    job: Job
    cluster: Cluster


def launch_synthesis(
    config_path: str,
    cluster_path: str,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    cpus: int | None = None,
    dry_run: bool = False,
) -> None:
    """Check and queue a run of a recipe. If there are findings, raise `ConfigError` with all of them.

    processes: tasks of the Slurm array that share the input rows. cpus: cores of each task, which run the
    programs of the sandbox. dry_run: print the scripts and only check the files.
    """
    settings, cluster = load_synthesis(config_path, overrides), load_cluster(cluster_path)
    cpus = cpus or min(CPUS, cluster.cpus_per_node)
    recipe = load_recipe(settings.recipe)
    recipe_settings(settings, recipe)
    found = _findings(settings, cluster, cpus=cpus)
    arguments = (config_path, *overrides)
    clients = _Planned(
        _job("run", arguments, settings, array=processes), _of_clients(settings, recipe, cluster, cpus)
    )
    servers = ending = None
    if settings.serve is not None:
        container = cluster.container
        if container is not None and settings.serve.image is not None:
            container = container.model_copy(update={"image": settings.serve.image})
        job = _job("serve", arguments, settings, array=settings.serve.servers, nodes=settings.serve.nodes)
        servers = _Planned(job, cluster.model_copy(update={"container": container}))
        ending = _Planned(_job("end-servers", arguments, settings), without_gpus(cluster, cpus=1))
    planned = [each for each in (servers, clients, ending) if each is not None]
    if dry_run:
        say("\n".join(f"# {line}" for line in _plan(settings, processes=processes)))
        for each in planned:
            say(f"# {slurm.submission(each.job, each.cluster)}")
            say(f"#   megatron-post {shlex.join(each.job.command)}")
        say("# This is the script of the first job. The scripts of the others differ in their settings.")
        show_script(planned[0].job, planned[0].cluster)
        raise_for(found, config_path)
        return
    found += active_findings([settings.output])
    found += [text for each in planned for text in slurm_findings(each.job, each.cluster)]
    raise_for(found, config_path)
    _submit(settings, servers, clients, ending)


def _findings(settings: Synthesis, cluster: Cluster, *, cpus: int) -> list[str]:
    found = cpu_findings(cpus, cluster)
    if (wanted := settings.serve) is None:
        return found
    if wanted.command is None and wanted.gpus > cluster.gpus_per_node:
        found.append(
            f"serve.gpus={wanted.gpus} is more than the cluster's gpus_per_node={cluster.gpus_per_node}"
        )
    if wanted.image is not None and cluster.container is None:
        found.append("serve.image has no effect, because the cluster file has no container")
    return found


def cpu_findings(cpus: int, cluster: Cluster) -> list[str]:
    """Whether a node has so many cores."""
    if cpus <= cluster.cpus_per_node:
        return []
    return [f"--cpus {cpus} is more than cpus_per_node={cluster.cpus_per_node} of the cluster"]


def _job(
    command: str, arguments: Sequence[str], settings: Synthesis, *, array: int | None = None, nodes: int = 1
) -> Job:
    return Job(
        name=f"{settings.recipe.rpartition('/')[2]}-{command}",
        command=("synthesize", command, *arguments),
        run_dir=settings.output,
        directory=Path.cwd(),
        nodes=nodes,
        ranks_per_node=1,
        array=array,
    )


def _of_clients(settings: Synthesis, recipe: Recipe, cluster: Cluster, cpus: int) -> Cluster:
    """The cluster settings of the processes of a recipe.

    Processes that only use servers take a part of a node without GPUs. If a model runs in the process, it
    takes a whole node.
    """
    if any(gpus_of(settings.models[name].backend) for name in recipe.models):
        return cluster
    return without_gpus(cluster, cpus=cpus)


def _plan(settings: Synthesis, *, processes: int) -> list[str]:
    lines = [f"processes that share the input rows: {processes}, with the output in {settings.output}"]
    if (wanted := settings.serve) is not None:
        lines += [
            f"servers of {wanted.model}: {wanted.servers}, each on {wanted.nodes} x {wanted.gpus} GPUs",
            f"they publish their addresses in {settings.servers}",
            "the processes start once the first server's job has started",
            "the last job ends the servers once all processes have ended, even if they failed",
        ]
    return lines


def _submit(
    settings: Synthesis, servers: _Planned | None, clients: _Planned, ending: _Planned | None
) -> None:
    """Queue the jobs. If Slurm refuses one, cancel the others and raise `SlurmError`."""
    ids: list[int] = []

    def submit(each: _Planned, after: Sequence[JobId] = (), when: slurm.When = "afterok") -> int:
        ids.append(slurm.submit(each.job, each.cluster, after=after, when=when))
        tasks: list[JobId] = [ids[-1]]
        if each.job.array is not None:
            tasks = [f"{ids[-1]}_{task}" for task in range(each.job.array)]
        recorded = [record_job([each.job.folder], each.job, task, after=tuple(after)) for task in tasks]
        many = f" to {tasks[-1]}" if len(tasks) > 1 else ""
        say(f"job {tasks[0]}{many} queued: {each.job.name}; log {recorded[0].log}")
        return ids[-1]

    try:
        if servers is None or ending is None:
            submit(clients)
            return
        clear_servers(settings.servers)
        server_key(settings.servers)
        first = f"{submit(servers)}_0"
        submit(ending, [submit(clients, [first], "after")], "afterany")
    except (slurm.SlurmError, ConfigError):
        slurm.cancel(ids)
        raise
