"""`megatron-post convert`: between Hugging Face or Meta weights and the trainer's checkpoints."""

from typing import Annotated, Literal

import typer

from megatron_post.display import make_console, say

convert_app = typer.Typer(no_args_is_help=True, help="Convert weights, streaming, between files alone.")

Workers = Annotated[int, typer.Option(min=1, help="Processes, on each node under srun or in an array.")]
MaxShardSize = Annotated[str, typer.Option(help="Largest safetensors file: 5GB, 500MB, 4GiB.")]


@convert_app.command("hf-to-megatron")
def hf_to_megatron(
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="Hugging Face's or Meta's directory")],
    ckpt_dir: Annotated[
        str, typer.Argument(metavar="CKPT_DIR", help="RUN_DIR/checkpoints of the run that starts from it")
    ],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Cast; by default as it is.")
    ] = None,
    workers: Workers = 1,
) -> None:
    """Write step 0 of a run. The same command again goes on with an interrupted one."""
    from megatron_post.convert.jobs import convert
    from megatron_post.convert.to_megatron import ToMegatron

    job = ToMegatron(hf_dir, ckpt_dir, dtype)
    job.check()
    convert(job, workers=workers, report=say)


@convert_app.command("megatron-to-hf")
def megatron_to_hf(
    ckpt_dir: Annotated[str, typer.Argument(metavar="CKPT_DIR", help="checkpoints of a run, or one step")],
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="directory to write")],
    step: Annotated[int | None, typer.Option(help="By default the newest.")] = None,
    max_shard_size: MaxShardSize = "5GB",
    workers: Workers = 1,
) -> None:
    """Write a directory that plain `transformers` loads."""
    from megatron_post.convert.jobs import convert
    from megatron_post.convert.shards import parse_size
    from megatron_post.convert.to_hf import ToHuggingFace

    convert(ToHuggingFace(ckpt_dir, hf_dir, step, parse_size(max_shard_size)), workers=workers, report=say)


@convert_app.command("verify")
def verify(
    first: Annotated[str, typer.Argument(metavar="A")], second: Annotated[str, typer.Argument(metavar="B")]
) -> None:
    """Compare two directories of any kind: names, shapes, dtypes, values."""
    from megatron_post.convert.verify import verify as compare

    compare(first, second, report=say)


@convert_app.command("inspect")
def inspect(directory: Annotated[str, typer.Argument(metavar="DIR")]) -> None:
    """Print what is in a directory: tensors, shapes, dtypes, bytes, step, config."""
    import sys

    from megatron_post.convert.inspect import inspect as show

    show(directory, console=make_console(width=None if sys.stdout.isatty() else 140))


@convert_app.command("plan")
def plan(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a preset, or a directory with config.json and index")
    ],
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of the weights.")] = "bf16",
    max_shard_size: MaxShardSize = "5GB",
    workers: Workers = 1,
    speed: Annotated[float, typer.Option(min=1.0, help="MB/s that the disk copies at.")] = 500.0,
) -> None:
    """Say what a conversion would take, without any weights."""
    from megatron_post.convert.plan import plan as make_plan
    from megatron_post.convert.plan import print_plan
    from megatron_post.convert.shards import parse_size

    size = parse_size(max_shard_size)
    result = make_plan(source, dtype=dtype, max_shard_bytes=size, workers=workers, megabytes_per_second=speed)
    print_plan(source, result, console=make_console())
