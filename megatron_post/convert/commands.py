"""`megatron-post convert` converts between Hugging Face or Meta weights and the trainer's checkpoints."""

from typing import Annotated, Literal

import typer

from megatron_post.display import make_console, say

convert_app = typer.Typer(no_args_is_help=True, help="Convert weights from files to files, block by block.")

Workers = Annotated[int, typer.Option(min=1, help="Processes in each task of srun or of a Slurm array.")]
MaxShardSize = Annotated[str, typer.Option(help="Largest safetensors file, such as 5GB, 500MB or 4GiB.")]


@convert_app.command("hf-to-megatron")
def hf_to_megatron(
    hf_dir: Annotated[
        str, typer.Argument(metavar="HF_DIR", help="directory of Hugging Face or Meta weights")
    ],
    ckpt_dir: Annotated[
        str, typer.Argument(metavar="CKPT_DIR", help="RUN_DIR/checkpoints of the run that starts from it")
    ],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Cast to this dtype. By default the dtype stays."),
    ] = None,
    workers: Workers = 1,
) -> None:
    """Write the weights as step 0 of a run. The same command resumes an interrupted conversion."""
    from megatron_post.convert.directions import convert_weights

    convert_weights(hf_dir, ckpt_dir, to="megatron", dtype=dtype, workers=workers)


@convert_app.command("megatron-to-hf")
def megatron_to_hf(
    ckpt_dir: Annotated[
        str, typer.Argument(metavar="CKPT_DIR", help="all checkpoints of a run, or one step")
    ],
    hf_dir: Annotated[str, typer.Argument(metavar="HF_DIR", help="directory to write")],
    step: Annotated[int | None, typer.Option(help="Step to convert. By default the newest.")] = None,
    max_shard_size: MaxShardSize = "5GB",
    workers: Workers = 1,
) -> None:
    """Write a directory that plain `transformers` loads."""
    from megatron_post.convert.directions import convert_weights

    convert_weights(ckpt_dir, hf_dir, to="hf", step=step, max_shard_size=max_shard_size, workers=workers)


@convert_app.command("verify")
def verify(
    first: Annotated[str, typer.Argument(metavar="A")], second: Annotated[str, typer.Argument(metavar="B")]
) -> None:
    """Compare the names, shapes, dtypes and values of two directories of any kind."""
    from megatron_post.convert.verify import compare_models

    compare_models(first, second, report=say)


@convert_app.command("inspect")
def inspect(directory: Annotated[str, typer.Argument(metavar="DIR")]) -> None:
    """Print the tensors of a directory with shapes, dtypes and bytes, its step and its config."""
    import sys

    from megatron_post.convert.inspect import inspect as show

    show(directory, console=make_console(width=None if sys.stdout.isatty() else 140))


@convert_app.command("plan")
def plan(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a preset, or a directory with config.json")
    ],
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the weights.")] = "bf16",
    max_shard_size: MaxShardSize = "5GB",
    workers: Workers = 1,
    speed: Annotated[float, typer.Option(min=1.0, help="Speed in MB/s at which the disk copies.")] = 500.0,
) -> None:
    """Estimate the files, memory and time of a conversion. This needs no weights."""
    from megatron_post.convert.plan import plan as make_plan
    from megatron_post.convert.plan import print_plan
    from megatron_post.convert.shards import parse_size

    size = parse_size(max_shard_size)
    result = make_plan(source, dtype=dtype, max_shard_bytes=size, workers=workers, megabytes_per_second=speed)
    print_plan(source, result, console=make_console())
