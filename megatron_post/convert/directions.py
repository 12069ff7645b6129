"""The conversions that the command line and Python offer, each from a directory to a directory."""

from pathlib import Path
from typing import Literal

from megatron_post.convert.jobs import ConversionError, Converted, Report, convert
from megatron_post.convert.shards import parse_size
from megatron_post.convert.to_hf import ToHuggingFace
from megatron_post.convert.to_megatron import ToMegatron
from megatron_post.display import say

SHARD_SIZE = "5GB"


def convert_weights(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["megatron", "hf"],
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    step: int | None = None,
    max_shard_size: str = SHARD_SIZE,
    workers: int = 1,
    report: Report = say,
) -> Converted:
    """Convert weights, block by block. The same call resumes an interrupted conversion.

    to="megatron": source is a directory of Hugging Face or Meta weights, and target the checkpoints of the
    run that starts from them. dtype: cast to it. None keeps the dtype.

    to="hf": source is all checkpoints of a run or one of them, and target a Hugging Face directory. step: the
    checkpoint to convert. None takes the newest. max_shard_size: largest safetensors file, such as "5GB".

    Raises `ConversionError` for an option of the other direction, an existing target and a full disk, and
    `ValueError` for a source that cannot be read.
    """
    if to == "hf":
        if dtype is not None:
            raise ConversionError(f"dtype={dtype}: a conversion to hf keeps the dtype; leave it out")
        size = parse_size(max_shard_size)
        return convert(ToHuggingFace(str(source), str(target), step, size), workers=workers, report=report)
    if to != "megatron":
        raise ConversionError(f"to={to!r}: choose 'megatron' or 'hf'")
    if step is not None or max_shard_size != SHARD_SIZE:
        raise ConversionError("step and max_shard_size belong to a conversion to hf; leave them out")
    job = ToMegatron(str(source), str(target), dtype)
    job.check()
    return convert(job, workers=workers, report=report)
