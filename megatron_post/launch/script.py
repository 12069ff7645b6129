"""Turn a job into the arguments of sbatch and a script that contains its settings.

Options are passed as arguments and never through a shell or `#SBATCH` lines, and every value in the script is
quoted. A name like `$(rm -rf ~)` is therefore never executed.
"""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megatron_post.config.section import one_line
from megatron_post.launch.cluster import Cluster

JobId = int | str  # a task of an array is "ARRAY_TASK"
_BEGIN, _END = "# >>> settings\n", "# <<< settings\n"


@dataclass(frozen=True)
class Job:
    """One Slurm job, which runs a command of megatron-post on all ranks of some nodes.

    name: the name that Slurm shows. command: the arguments that follow `megatron-post`. then: further
    commands of the job, each of which starts once the one before has ended with 0. directory: the working
    directory of the job. run_dir: the directory of its checkpoints and its log, relative to `directory`.
    ranks_per_node: None takes the cluster's value. A command that is a single process sets 1. array: the
    number of tasks of a Slurm array, each of which is such a job. None submits one job. tasks: the command
    and the run_dir of each task, in place of those of the job.
    """

    name: str
    command: tuple[str, ...]
    run_dir: str
    directory: Path
    nodes: int = 1
    ranks_per_node: int | None = None
    array: int | None = None
    tasks: tuple[tuple[tuple[str, ...], str], ...] = ()
    then: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        others = [text for command, run_dir in self.tasks for text in (*command, run_dir)]
        others += [text for command in self.then for text in command]
        for text in (self.name, *self.command, *others, self.run_dir, str(self.directory)):
            one_line(text)
        assert not self.tasks or (self.array == len(self.tasks) and not self.then)

    @property
    def log(self) -> Path:
        """The job's log, with Slurm's `%j` for the job id, or `%A_%a` for those of an array and its task."""
        return self.folder / f"{self._file_name}-{'%j' if self.array is None else '%A_%a'}.log"

    def log_of(self, job_id: JobId) -> Path:
        """The log of the job or of the task of an array that has this id."""
        return self.log.with_name(re.sub("%j|%A_%a", str(job_id), self.log.name))

    @property
    def folder(self) -> Path:
        """The directory in which the launcher keeps its files about a run."""
        return launch_folder(self.directory / self.run_dir)

    @property
    def _file_name(self) -> str:
        """The job's name with a dash for each character except letters, digits, dots and underscores."""
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in self.name)
        return kept.strip(".-")[:80] or "job"


def launch_folder(run_dir: Path) -> Path:
    """The directory of a run's logs, its record of jobs and the progress notes that `train.sbatch` writes."""
    return run_dir / "slurm"


def sbatch_options(job: Job, cluster: Cluster) -> list[str]:
    """Arguments of sbatch for a job, except those that depend on other jobs."""
    ranks = job.ranks_per_node or cluster.ranks
    gpus = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": ranks,
        "cpus-per-task": cluster.cpus_per_node // ranks,
        "gpus-per-node": gpus if cluster.gpus_per_node else None,
        "time": cluster.time_limit,
        "signal": f"B:USR1@{cluster.warning_seconds}",
        "open-mode": "append",
        # sbatch expands % in this option only, so a % in the directory's name must be doubled
        "output": str(job.log.parent).replace("%", "%%") + "/" + job.log.name,
        "chdir": job.directory,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.exclude) or None,
        "mem": cluster.memory,
        "array": None if job.array is None else f"0-{job.array - 1}",
    }
    flags = ["--requeue", *(["--exclusive"] if cluster.exclusive else [])]
    return [f"--{name}={value}" for name, value in options.items() if value is not None] + flags


def render(job: Job, cluster: Cluster) -> str:
    """The script of a job: `train.sbatch` with the settings of this job."""
    template = resources.files("megatron_post.launch").joinpath("train.sbatch").read_text()
    head, rest = template.split(_BEGIN)
    _, body = rest.split(_END)
    header = "".join(line for line in head.splitlines(keepends=True) if not line.startswith("#SBATCH"))
    return header + _BEGIN + "\n".join(_settings(job, cluster)) + "\n" + _END + body


def _settings(job: Job, cluster: Cluster) -> list[str]:
    def array(name: str, values: list[str]) -> str:
        return f"{name}=({shlex.join(values)})"

    container: list[str] = []
    if cluster.container is not None:
        container = [
            f"--container-image={cluster.container.image}",
            f"--container-workdir={job.directory}",
            "--no-container-mount-home",
        ]
        if cluster.container.mounts:
            container.append(f"--container-mounts={','.join(cluster.container.mounts)}")
    setup = cluster.setup or (":",)
    return [
        f"PYTHON={shlex.quote(cluster.python or ('python3' if cluster.container else sys.executable))}",
        f"RUN_DIR={shlex.quote(job.run_dir)}",
        f"MAX_STALLED_RESTARTS={cluster.max_stalled_restarts}",
        f"NODE_CHECK={int(cluster.node_check)}",
        f"NUMA_BINDING={cluster.numa_binding or ''}",
        array("CONTAINER", container),
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.environment.items())),
        "setup() {",
        *(f"    {line}" for line in setup),
        "}",
        *(_task_settings(job, array) if job.tasks else [array("command", list(job.command))]),
        "take_command() {",
        "    case $1 in",
        *(f"    {n}) {array('command', list(each))} ;;" for n, each in enumerate(job.then, start=1)),
        "    *) return 1 ;;",
        "    esac",
        "}",
    ]


def _task_settings(job: Job, array: Callable[[str, list[str]], str]) -> list[str]:
    """The command and the run_dir of each task of an array."""
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for number, (command, run_dir) in enumerate(job.tasks):
        lines.append(f"{number}) RUN_DIR={shlex.quote(run_dir)} {array('command', list(command))} ;;")
    return [*lines, "esac"]
