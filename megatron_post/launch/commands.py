"""The options and the output of `megatron-post launch`."""

import subprocess
import sys
from typing import Annotated

import typer

from megatron_post.display import make_console, say
from megatron_post.plan.commands import with_default

launch_app = typer.Typer(
    cls=with_default("submit"),
    no_args_is_help=True,
    help="Run on Slurm: `launch CONFIG --cluster FILE [--dry-run] [-- KEY=VALUE...]`.",
)
ClusterPath = Annotated[str, typer.Option(help="YAML file of the cluster")]
DryRun = Annotated[bool, typer.Option(help="Print the script and the placement of ranks. Queue nothing.")]
RunDir = Annotated[str, typer.Argument(metavar="RUN", help="run_dir of the launched run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[-- KEY=VALUE...]")]


@launch_app.command("submit")
def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run")],
    cluster: ClusterPath,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Number of nodes. The default is the fewest that hold the model."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job. The default is its run_dir.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Check everything, then queue a training run. The word `submit` may be left out."""
    from megatron_post.launch.launch import launch_run

    launch_run(config, cluster, overrides or (), nodes=nodes, name=name, dry_run=dry_run)


@launch_app.command("synthesize")
def synthesize(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a recipe's run")],
    cluster: ClusterPath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Tasks of the array that share the input.")] = 1,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of each task. The default is at most 8.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Check everything, then queue a recipe's processes, and the servers of its section `serve`."""
    from megatron_post.launch.synthesis import launch_synthesis

    launch_synthesis(config, cluster, overrides or (), processes=processes, cpus=cpus, dry_run=dry_run)


@launch_app.command("curate")
def curate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a curation")],
    cluster: ClusterPath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Tasks of the array that share the rows.")] = 1,
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores of each task that uses no GPU. The default is at most 8."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Check everything, then queue the processes of a curation."""
    from megatron_post.launch.curation import launch_curation

    launch_curation(config, cluster, overrides or (), processes=processes, cpus=cpus, dry_run=dry_run)


@launch_app.command("status")
def status(run: RunDir) -> None:
    """Show the state, the restarts and the newest checkpoint of each job of a run, and why it ended."""
    from rich.table import Table

    from megatron_post.launch.record import status_rows

    rows = status_rows(run)
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*row.values())
    make_console().print(table, highlight=False)


@launch_app.command("cancel")
def cancel(run: RunDir) -> None:
    """Cancel the jobs of a run that have not ended."""
    from megatron_post.launch.record import cancel_run

    say(f"cancelled: {', '.join(map(str, cancel_run(run))) or 'none, all have ended'}")


@launch_app.command("logs")
def logs(
    run: RunDir,
    lines: Annotated[int, typer.Option(min=1, help="Lines of each log.")] = 40,
    follow: Annotated[bool, typer.Option(help="Keep printing new lines of the newest log.")] = False,
) -> None:
    """Print the end of the log of every job of a run."""
    from megatron_post.launch.record import submitted_jobs, tail

    jobs = submitted_jobs(run)
    for job in jobs:
        say(f"==> {job.job_id} {job.name}: {job.log}")
        say(tail(job.log, lines) if job.log.is_file() else "(no log yet)")
    if follow:
        command = ["tail", "-n", "0", "-F", "--", str(jobs[-1].log)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.removesuffix("\n"))


@launch_app.command("check-nodes", hidden=True)
def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG")],
    overrides: Overrides = None,
) -> None:
    """Check the nodes when a job starts. Each rank runs this command as one process."""
    from megatron_post.config.load import load_config
    from megatron_post.launch.node_check import check_nodes

    sys.exit(0 if check_nodes(load_config(config, overrides or ()).parallel) else 1)
