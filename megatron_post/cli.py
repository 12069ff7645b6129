"""The command line. Each command calls one function and imports it when it runs, so that `--help` is fast."""

import io
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_post.bench.commands import bench_app
from megatron_post.convert.commands import convert_app
from megatron_post.curation.commands import curate_app
from megatron_post.display import make_console, printable, say, say_json
from megatron_post.errors import exit_status
from megatron_post.launch.commands import ClusterPath, DryRun, launch_app
from megatron_post.plan.commands import plan_app
from megatron_post.rounds.annotation.commands import annotate_app
from megatron_post.rounds.commands import evaluate_app, rounds_app
from megatron_post.synthesis.commands import synthesize_app

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Post-training for Llama 3 on megatron-core.")  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Pack data into a store, and inspect it.")
config_app = typer.Typer(no_args_is_help=True, help="Show and describe configs.")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")
app.add_typer(launch_app, name="launch")
app.add_typer(plan_app, name="plan")
app.add_typer(synthesize_app, name="synthesize")
app.add_typer(curate_app, name="curate")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(annotate_app, name="annotate")
app.add_typer(rounds_app)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optimizer.lr=5e-7")
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="packed store")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"megatron-post {version('megatron-post')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    os.environ["MEGATRON_POST_DEBUG"] = "1" if debug else os.environ.get("MEGATRON_POST_DEBUG", "")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a stage, on many ranks under torchrun. Run the same command again to resume."""
    from megatron_post.config.load import load_config
    from megatron_post.train.run import train as run
    from megatron_post.train.signals import Requeue

    if not run(load_config(config, overrides or ())).is_finished:
        raise Requeue


@app.command()
def push(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="export of a run, a merge or `convert`")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="ORGANIZATION/NAME or USER/NAME on the hub")],
    revision: Annotated[str | None, typer.Option(help="Branch to write. By default `main`.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is public. By default it is private.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print what would be uploaded. Upload nothing.")] = False,
) -> None:
    """Upload an export with its model card to the Hugging Face Hub."""
    from megatron_post.convert.publishing.push import check_export
    from megatron_post.convert.publishing.push import push as upload

    export = check_export(Path(directory), repo)
    width = max(map(len, export.files))
    say("\n".join(f"{name:<{width}}  {size:>15,} bytes" for name, size in export.files.items()))
    for note in export.notes:
        say(f"note: {note}")
    if not dry_run:
        say(upload(export, repo, private=not public, revision=revision))


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="directory of a training run, finished or not")],
    html: Annotated[str, typer.Option(help="Page to write. By default report.html in RUN.")] = "",
) -> None:
    """Show a training run on one HTML page: metrics, memory, starts, and the plan beside them.

    A run that finishes writes the page itself.
    """
    from megatron_post.train.report import write_run_report

    say(write_run_report(Path(run), Path(html) if html else None))


@launch_app.command("round")
def launch_round(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML of a round, or of a chain of steps")],
    cluster: ClusterPath,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[-- KEY=VALUE...]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Queue a round or another chain of jobs. Each job starts after its predecessors have succeeded."""
    from megatron_post.config.chain import is_chain, load_chain
    from megatron_post.launch.launch import launch_chain
    from megatron_post.rounds.chain import chain_of

    if is_chain(file):
        chain = load_chain(file, overrides or ())
    else:
        chain = chain_of(file, overrides or (), console=make_console(), needs_inputs=not dry_run)
    program = typer.main.get_command(app)
    launch_chain(chain, cluster, origin=file, program=program, dry_run=dry_run)


@curate_app.command("run")
def curate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML: sources, steps, models, run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Number of this process, from 0; by default that of a Slurm array.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Processes that share the rows; by default those of a Slurm array.")
    ] = None,
) -> None:
    """Annotate the rows step by step, and write those that every step keeps. The same command resumes.

    The word `run` may be left out.
    """
    from megatron_post.curation.run import curate as run
    from megatron_post.curation.settings import load_curation
    from megatron_post.rounds.ranking import open_ranker

    settings = load_curation(file, overrides or ())
    run(settings, rank=rank, size=size, open_ranker=open_ranker, console=make_console())


@data_app.command("pack")
def data_pack(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing store.")] = False,
    append: Annotated[bool, typer.Option(help="Add to an existing store of the same settings.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that render rows. Default: one for each core.")
    ] = None,
) -> None:
    """Read data.sources, render, pack and store them."""
    from megatron_post.config.load import load_config
    from megatron_post.data.build import build_store

    build_store(load_config(config, overrides or ()), overwrite=overwrite, append=append, workers=workers)


@data_app.command("prompt")
def data_prompt(
    config: ConfigPath,
    output: Annotated[str, typer.Option(help="JSON lines to write.")],
    overrides: Overrides = None,
    group: Annotated[
        Literal["held_out", "train", "eval"],
        typer.Option(help="Sources of held-out tasks, sources that are trained on, or data.eval_sources."),
    ] = "held_out",
) -> None:
    """Write the rows of data.prompted as text, with their choices, for `evaluate choices`."""
    from megatron_post.config.load import load_config
    from megatron_post.data.sources import write_prompted

    count = write_prompted(load_config(config, overrides or ()), output, group)
    say(f"{output}: {count} rows")


@data_app.command("show")
def data_show(
    store: StorePath,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer; by default the one that packed the store.")] = "",
    pack: Annotated[int, typer.Option(help="Number of the pack.")] = 0,
    group: Annotated[Literal["train", "eval"], typer.Option(help="Training or held-out packs.")] = "train",
) -> None:
    """Print a pack as text. Colours show roles, and trained tokens are underlined."""
    from megatron_post.data.show import show_pack

    show_pack(store, pack, group=group, tokenizer_path=tokenizer or None, console=make_console())


@data_app.command("stats")
def data_stats(store: StorePath) -> None:
    """Print turns, tokens in context and response, and packing efficiency, by source."""
    from megatron_post.data.stats import print_stats

    print_stats(store, console=make_console())


@data_app.command("verify")
def data_verify(store: StorePath) -> None:
    """Read the whole store and compare it with its checksums."""
    from megatron_post.data.check_store import check_store

    check_store(store, console=make_console())


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config."""
    from megatron_post.config.load import load_config, to_yaml

    loaded = load_config(config, overrides or ())
    text = to_yaml(loaded).removesuffix("\n")
    if printable(text) == text:
        say(text)
    else:  # JSON is YAML as well, and escapes control characters
        say_json(loaded.model_dump(mode="json"))


@config_app.command("list")
def config_list() -> None:
    """List the configs that are installed with the package, each with its purpose."""
    from megatron_post.config.shipped import listed

    purposes = listed()
    width = max(map(len, purposes))
    say("\n".join(f"{name:<{width}}  {purpose}" for name, purpose in purposes.items()))


@config_app.command("copy")
def config_copy(
    name: Annotated[str, typer.Argument(help="e.g. `llama3_8b`, `llama3_8b/sft` or `launchers`")],
    to: Annotated[str, typer.Option(help="Directory that the copies lie under, by their path.")] = ".",
) -> None:
    """Copy installed configs to edit them, with the files that they refer to."""
    from megatron_post.config.shipped import copy

    files = copy(name, Path(to))
    say("\n".join(str(file) for file in files) or f"{to} has the same files already")


@config_app.command("schema")
def config_schema(
    file: Annotated[
        Literal["run", "round", "generate", "select", "merge", "cleaning", "cluster", "chain", "synthesis",
                "curation"],
        typer.Argument(help="kind of the file. `train` takes the kind `run`."),
    ] = "run",
) -> None:  # fmt: skip
    """Print the JSON schema of a file of settings. It describes every key, and editors can use it."""
    from megatron_post.config.chain import Chain
    from megatron_post.config.load import json_schema
    from megatron_post.config.schema import Config
    from megatron_post.config.section import Section
    from megatron_post.curation.rules import Rules
    from megatron_post.curation.settings import Curation
    from megatron_post.inference.generate import Generate
    from megatron_post.launch.cluster import Cluster
    from megatron_post.rounds.merge_settings import Merge
    from megatron_post.rounds.select_settings import Select
    from megatron_post.rounds.settings import RoundSettings
    from megatron_post.synthesis.settings import Synthesis

    schemas: dict[str, type[Section]] = {
        "run": Config, "round": RoundSettings, "generate": Generate, "select": Select, "merge": Merge,
        "cleaning": Rules, "cluster": Cluster, "chain": Chain, "synthesis": Synthesis,
        "curation": Curation,
    }  # fmt: skip
    say(json_schema(schemas[file]))


@app.command()
def doctor() -> None:
    """Report versions, devices, Slurm, the active fused parts, and the cost of each missing one."""
    from megatron_post.doctor.report import diagnose

    diagnose(make_console())


@app.command()
def demo(
    overrides: Overrides = None,
    config: Annotated[
        str, typer.Option(help="YAML file of the demo.", show_default="the installed tiny/demo.yaml")
    ] = "",
    run_dir: Annotated[
        str, typer.Option(help="Output directory; an earlier demo is replaced.")
    ] = "runs/demo",
    train_problems: Annotated[int, typer.Option(min=100, help="Dialogs to train on.")] = 20000,
    held_out_problems: Annotated[int, typer.Option(min=4, help="Problems to answer.")] = 300,
    round_problems: Annotated[int, typer.Option(min=20, help="Problems to answer a round.")] = 800,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of alignment.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Number of seeds to repeat everything for.")] = 1,
) -> None:
    """Train and align a tiny Llama on a small generated task on the CPU, and show what it has learned."""
    from megatron_post.config.shipped import shipped
    from megatron_post.demo.run import Sizes, run_demo
    from megatron_post.demo.seeds import run_seeds

    config = config or str(shipped("configs/tiny/demo.yaml"))
    sizes = Sizes(train_problems, held_out_problems, round_problems, rounds)
    if seeds == 1:
        run_demo(config, [f"run_dir={run_dir}", *(overrides or ())], sizes=sizes, console=make_console())
    else:
        run_seeds(config, overrides or (), run_dir=run_dir, seeds=seeds, sizes=sizes, console=make_console())


def main() -> None:
    """Run the command that the arguments name, and exit with its status (see `errors`)."""
    # `doctor` reports missing parts and their cost. Without the filter every rank would print this too.
    warnings.filterwarnings(
        "ignore", message=".*(Transformer Engine and Apex|Apex is not|full scope is deprecated)"
    )
    warnings.filterwarnings(
        "ignore", message=".*(is deprecated. Please use|attribute of a Tensor that is not a leaf)"
    )
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character is shown its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(exit_status(lambda: app(standalone_mode=False)))
