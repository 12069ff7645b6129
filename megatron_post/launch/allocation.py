"""The Slurm jobs of a chain: what each step takes of the cluster, and which steps share a job."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_post.config.chain import Chain, ChainJob, ChainTask
from megatron_post.curation.settings import load_curation, users_of_gpus
from megatron_post.launch.cluster import CPUS, Cluster, without_gpus
from megatron_post.launch.script import Job

# Commands of a single process that use no GPU, whatever their arguments are.
_WITHOUT_GPUS = frozenset(("annotate", "config", "convert", "data", "merge", "plan", "report", "select"))


@dataclass(frozen=True)
class ChainedJob:
    """One job of a chain.

    steps: the step that it runs, or small steps that it runs one after the other. cluster: the settings for
    it. gpus_per_rank: the number that each rank uses if the nodes have GPUs.
    """

    steps: tuple[ChainJob, ...]
    job: Job
    cluster: Cluster
    gpus_per_rank: int

    @property
    def gpus(self) -> int:
        """GPUs that Slurm allocates to it, or to each task of an array."""
        return self.job.nodes * self.cluster.gpus_per_node

    @property
    def idle_gpus(self) -> int:
        """Allocated GPUs that no rank uses."""
        used = self.job.nodes * (self.job.ranks_per_node or self.cluster.ranks) * self.gpus_per_rank
        return max(0, self.gpus - used)


def chained_jobs(chain: Chain, cluster: Cluster, directory: Path) -> list[ChainedJob]:
    """The jobs in the order in which they are submitted. Raises `ConfigError` for a wrong curation file."""
    gpus = {step.name: _gpus_per_rank(step, directory) for step in chain.steps}
    shared: list[list[ChainJob]] = []
    for step in chain.ordered():
        before = next((job for job in shared if _may_follow(step, job[-1], chain, gpus)), None)
        if before is None:
            shared.append([step])
        else:
            before.append(step)
    return [_job(steps, chain, cluster, directory, gpus[steps[0].name]) for steps in shared]


def _job(
    steps: Sequence[ChainJob], chain: Chain, cluster: Cluster, directory: Path, gpus_per_rank: int
) -> ChainedJob:
    first, ranks = steps[0], steps[0].ranks_per_node
    if not gpus_per_rank:
        ranks = ranks or 1
        cpus = min(CPUS * ranks, cluster.cpus_per_node)
        cluster = without_gpus(cluster, cpus=cpus, ranks=ranks)
    job = Job(
        name="+".join(step.name for step in steps),
        command=first.command,
        then=tuple(step.command for step in steps[1:]),
        run_dir=first.run_dir or chain.run_dir,
        directory=directory,
        nodes=first.nodes,
        ranks_per_node=ranks,
        array=len(first.tasks) or None,
        tasks=tuple((task.command, task.run_dir or chain.run_dir) for task in first.tasks),
    )
    return ChainedJob(tuple(steps), job, cluster, gpus_per_rank)


def _may_follow(step: ChainJob, before: ChainJob, chain: Chain, gpus: dict[str, int]) -> bool:
    """Whether `step` may share the job of the step before it.

    Both are small. No other step waits for `before`, because it would then wait for `step` too.
    """
    waiting = [other.name for other in chain.steps if before.name in other.after]
    small = all(_is_small(each) and not gpus[each.name] for each in (before, step))
    return small and step.after == (before.name,) and waiting == [step.name]


def _is_small(step: ChainJob) -> bool:
    """Whether a step is one process without checkpoints of its own, by which the script sees progress."""
    processes = step.nodes * (step.ranks_per_node or 1)
    return processes == 1 and not step.tasks and step.run_dir is None and step.command[0] != "train"


def _gpus_per_rank(step: ChainJob, directory: Path) -> int:
    if step.gpus_per_rank is not None:
        return step.gpus_per_rank
    return int(any(_uses_gpus(task, directory) for task in step.commands))


def _uses_gpus(task: ChainTask, directory: Path) -> bool:
    words = [word for word in task.command if not word.startswith("-")]
    if words[:2] == ["curate", "run"] and len(words) > 2 and (directory / words[2]).is_file():
        overrides = [word for word in words[3:] if "=" in word]
        return bool(users_of_gpus(load_curation(str(directory / words[2]), overrides)))
    return not words or words[0] not in _WITHOUT_GPUS
