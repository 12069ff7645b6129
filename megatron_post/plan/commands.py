"""The options and the output of `megatron-post plan`."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_post.display import make_console, say_json
from megatron_post.storage.writing import write_text


def with_default(name: str) -> type[TyperGroup]:
    """A group of commands in which `plan CONFIG` means `plan show CONFIG`. name: the default command.

    A first word that is not a command goes to the default command. A config that is named like a command must
    be written as ./NAME.
    """

    class Group(TyperGroup):
        default = name

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            word = args[0] if args else "--help"
            # The group handles a misspelt command, and suggests the right one.
            is_misspelt = bool(difflib.get_close_matches(word, self.commands)) and not Path(word).exists()
            if word not in (*self.commands, "--help", "-h") and not is_misspelt:
                args = [name, *args]
            return super().parse_args(ctx, args)

    return Group


plan_app = typer.Typer(
    cls=with_default("show"),
    no_args_is_help=True,
    help="Predict memory and time of a run: `plan CONFIG --gpus N [--gpu NAME] [-- KEY=VALUE...]`.",
)
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[-- KEY=VALUE...]")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs of the run.")]
Gpu = Annotated[str, typer.Option(help="h100-80gb, h200-141gb or b200-180gb.")]
SegmentLength = Annotated[
    int | None, typer.Option(help="Tokens of the segments that fill a pack. By default one segment.")
]
TrainedShare = Annotated[
    float, typer.Option(help="Share of the tokens that carry loss, from `data stats`. By default all.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@plan_app.command("show")
def show(
    config: ConfigPath,
    gpus: Gpus,
    overrides: Overrides = None,
    gpu: Gpu = "h100-80gb",
    segment_length: SegmentLength = None,
    trained_share: TrainedShare = 1.0,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Hours of a Slurm job.")] = 24,
    node_mtbf: Annotated[
        float, typer.Option(min=1, help="Mean hours until a node fails. Llama 3's report had 6,334.")
    ] = 6334,
    as_json: AsJson = False,
    html: Annotated[str | None, typer.Option(help="Also write a page with charts.")] = None,
) -> None:
    """Print memory by rank and kind, time, and what the whole run takes. The word `show` may be omitted.

    The exit status is 1 if the run does not fit.
    """
    from megatron_post.config.load import load_config
    from megatron_post.plan import report
    from megatron_post.plan.estimate import make_plan
    from megatron_post.plan.outlook import Outlook
    from megatron_post.plan.page import page

    plan = make_plan(
        load_config(config, overrides or ()),
        gpus=gpus,
        gpu=gpu,
        segment_length=segment_length,
        trained_share=trained_share,
    )
    if html is not None:
        write_text(html, page(plan))
    outlook = Outlook(plan, time_limit=time_limit * 3600, node_hours=node_mtbf)
    if as_json:
        say_json(report.plan_json(outlook))
    else:
        report.print_plan(outlook, make_console())
    raise typer.Exit(0 if plan.shortfall <= 0 else 1)


@plan_app.command("compare")
def compare(
    first: Annotated[str, typer.Argument(metavar="CONFIG")],
    second: Annotated[str, typer.Argument(metavar="CONFIG")],
    gpus: Gpus,
    overrides: Overrides = None,
    gpus_of_second: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the second run, if it has others.")
    ] = None,
    gpu: Gpu = "h100-80gb",
) -> None:
    """Print the plans of two configs side by side. Overrides apply to both."""
    from megatron_post.config.load import load_config
    from megatron_post.plan import report
    from megatron_post.plan.estimate import make_plan

    plans = [
        make_plan(load_config(config, overrides or ()), gpus=count, gpu=gpu)
        for config, count in ((first, gpus), (second, gpus_of_second or gpus))
    ]
    names = (first, second if second != first else f"{second} (second)")
    report.print_comparison(dict(zip(names, plans, strict=True)), make_console())


@plan_app.command("search")
def search(
    config: ConfigPath,
    gpus: Gpus,
    overrides: Overrides = None,
    gpu: Gpu = "h100-80gb",
    segment_length: SegmentLength = None,
    trained_share: TrainedShare = 1.0,
    as_json: AsJson = False,
    fp8: Annotated[
        str | None,
        typer.Option(help="Try this recipe, such as tensorwise, as well as the config's and none."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="File in which a config with the winner is written.")
    ] = None,
) -> None:
    """Rank all layouts that fit, fastest first, and print the winner as YAML."""
    from megatron_post.config.load import load_config
    from megatron_post.plan import report
    from megatron_post.plan.hardware import gpu as gpu_of
    from megatron_post.plan.search import search as find

    found = find(
        load_config(config, overrides or ()),
        gpus=gpus,
        gpu=gpu_of(gpu),
        segment_length=segment_length,
        trained_share=trained_share,
        fp8=fp8,
    )
    if output is not None:
        write_text(output, report.winner_config(found, config, overrides or ()))
    if as_json:
        say_json(report.search_json(found))
    else:
        report.print_search(found, make_console())


@plan_app.command("dry-run")
def dry_run(
    config: ConfigPath,
    gpus: Gpus,
    overrides: Overrides = None,
    rank: Annotated[str, typer.Option(help="A rank, or `all` for one rank of every stage.")] = "all",
    gpus_per_node: Annotated[
        int, typer.Option(min=1, help="GPUs of a node. Tensor-parallel groups must stay inside a node.")
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Build every distinct stage without memory, check all groups, and trace the collectives of one pack."""
    from megatron_post.config.load import load_config
    from megatron_post.plan import report
    from megatron_post.plan.dry_run import dry_run as build

    if rank != "all" and not rank.isdecimal():
        raise ValueError(f"--rank {rank}: want a number or `all`")
    ranks = None if rank == "all" else [int(rank)]
    found = build(load_config(config, overrides or ()), world_size=gpus, per_node=gpus_per_node, ranks=ranks)
    if as_json:
        say_json(report.dry_run_json(found))
    else:
        report.print_dry_run(found, make_console())
