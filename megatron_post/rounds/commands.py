"""The command line of `megatron-post reference`, `score`, `merge`, `generate`, `select` and `round`."""

from typing import Annotated, Literal

import typer

from megatron_post.display import make_console, say

rounds_app = typer.Typer()
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model.")


@evaluate_app.command("choices")
def choices(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory of a language model")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="rows that `data prompt` has written")],
    output: Annotated[str, typer.Option(help="JSON lines of log-probabilities to write or to continue.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Rank the choices of prompts by log-probability, and report the accuracy over a dataset's prompts.

    Under torchrun it runs in any layout. The same command continues an interrupted one.
    """
    from megatron_post.parallel.environment import rank_from_environment
    from megatron_post.rounds.choices import evaluate_choices, print_report

    report = evaluate_choices(model, file, output, overrides or ())
    if rank_from_environment()[0] == 0:
        print_report(report, console=make_console())


@evaluate_app.command("tasks")
def tasks(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face directory, name of the hub, or checkpoint")
    ],
    names: Annotated[str, typer.Option("--tasks", help="Tasks, such as `gsm8k,ifeval`.")],
    backend: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What runs the model.")
    ] = "transformers",
    task_dir: Annotated[str | None, typer.Option(help="Directory of further tasks as YAML.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt. By default each task's own number.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task. By default all.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Render prompts by the chat template.")] = False,
) -> None:
    """Run benchmarks of lm-evaluation-harness. A checkpoint is exported, evaluated and removed."""
    from megatron_post.rounds.tasks import TaskSettings, evaluate_tasks

    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    settings = TaskSettings(chosen, backend, task_dir, shots, limit, batch, chat)
    for result in evaluate_tasks(model, settings):
        error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
        say(f"{result.task}: {result.metric} {result.value:.4f}{error}")


@rounds_app.command("reference")
def reference(
    store: Annotated[str, typer.Argument(metavar="STORE", help="packed store")],
    model: Annotated[str, typer.Option(help="Hugging Face directory that DPO will start from.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Write a reference model's log-probabilities into a store. Under torchrun it runs in any layout."""
    from megatron_post.rounds.reference import write_reference

    write_reference(store, model, overrides or ())


@rounds_app.command("score")
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory of a reward model")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="dialogs or preferences, as `data pack` reads")],
    output: Annotated[str, typer.Option(help="JSON lines to write or to continue.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Write a reward model's scores of responses. The same command continues an interrupted one."""
    from megatron_post.parallel.environment import rank_from_environment
    from megatron_post.rounds.score import score_file

    scored = score_file(model, file, output, overrides or ())
    if rank_from_environment()[0] == 0:
        failed, already = scored.failed_prompts, scored.rows - scored.written
        say(
            f"{scored.written} rows scored into {output}"
            + (f"; {already} were scored already" if already else "")
            + (f"; {failed} prompts had failed, and their missing responses have no score" if failed else "")
        )


@rounds_app.command("merge")
def merge(
    method: Annotated[
        Literal["linear", "ties", "slerp", "dare_ties"],
        typer.Argument(metavar="METHOD", help="linear, ties, slerp or dare_ties"),
    ],
    config: Annotated[str, typer.Option(help="YAML of models, weights and densities")],
    output: Annotated[str, typer.Option(help="Hugging Face directory to write")],
    workers: Annotated[int, typer.Option(help="Processes on this node.")] = 1,
) -> None:
    """Average models of one architecture with little memory. The same command continues a killed one."""
    from megatron_post.rounds.merge import merge as write

    write(config, output, method=method, workers=workers)


@rounds_app.command("generate")
def generate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML: model, prompts, sampling")],
    output: Annotated[str, typer.Option(help="JSON lines to write")],
) -> None:
    """Generate K responses per prompt. The same command continues an interrupted one.

    Under torchrun or srun each rank generates a share.
    """
    from megatron_post.config.load import load_section
    from megatron_post.inference.generate import Generate
    from megatron_post.inference.generate import generate as write
    from megatron_post.inference.ranks import take_gpus

    settings = load_section(Generate, config)
    take_gpus(settings.backend)
    write(settings, output)


@rounds_app.command("select")
def select(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML: samples, scores, verifier")],
    output: Annotated[str, typer.Option(help="directory of the SFT and the preference set")],
) -> None:
    """Choose the best of K responses to train on, and the best and the worst to compare."""
    from megatron_post.config.load import load_section
    from megatron_post.rounds.select import select_file
    from megatron_post.rounds.select_settings import Select

    found = select_file(load_section(Select, config), output)
    say(
        f"{output}: {found['responses']} responses to {found['prompts']} prompts, {found['sft_rows']} rows "
        f"to train on, {found['preferences']} preferences ({found['edited']} edited), {found['ties']} ties"
        + (f"; {found['failed']} prompts had failed" if found["failed"] else "")
    )
    for rule in found["cleaning"]:
        say(f"  {rule['name']}: found in {rule['found']} of {rule['total']}, {rule['dropped']} dropped")


@rounds_app.command("round")
def run_round(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML of the rounds")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    only: Annotated[str | None, typer.Option(help="Run only this step, as round-01/select.")] = None,
    again_from: Annotated[str | None, typer.Option(help="Repeat this step and all later ones.")] = None,
    held: Annotated[bool, typer.Option("--held", hidden=True)] = False,
    chain: Annotated[str | None, typer.Option(help="Write a chain file for `launch round` instead.")] = None,
) -> None:
    """Run rounds of reward model, sampling, SFT, DPO and averaging. The same command continues them."""
    from megatron_post.rounds.chain import write_chain
    from megatron_post.rounds.run import run_rounds

    console = make_console()
    if chain is not None:
        count = write_chain(config, overrides or (), chain, console=console)
        say(f"{chain}: {count} steps; queue them with `megatron-post launch round {chain} --cluster FILE`")
        return
    run_rounds(config, overrides or (), console=console, only=only, again_from=again_from, held=held)
