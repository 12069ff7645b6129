"""Writes a PEFT directory from the ranks of a run, and the merged values of their weights."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_post.config.adapter import Adapter
from megatron_post.config.sections import Model
from megatron_post.convert.adapter_weights import HEAD, PREFIX, gathered_adapters, peft_shapes
from megatron_post.convert.hf_writer import gathered_tensors
from megatron_post.convert.peft_directory import ADAPTER_CONFIG, ADAPTER_MODEL, peft_config
from megatron_post.convert.safetensors_file import OpenFiles, read_header, read_tensor, write_file
from megatron_post.convert.source import Kind
from megatron_post.models.adapted import places
from megatron_post.models.llama import Llama
from megatron_post.parallel.topology import Topology


def export_adapter(
    chunks: list[Llama],
    settings: Adapter,
    model: Model,
    topology: Topology,
    directory: str | Path,
    *,
    documents: Callable[[dict[str, bytes]], dict[str, bytes]] = lambda companions: {},
) -> Path:
    """Write an adapter so that `peft` loads it. All ranks must call it.

    A reward model's head is in the directory as well. The first replica of each pipeline stage writes a file
    of its own, which rank 0 joins, because PEFT reads one file. The directory is renamed to its name when it
    is complete. documents: called by rank 0 with the config, returns further files.
    """
    target = Path(directory)
    partial = target.with_name(f".partial-{target.name}")
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()  # no rank may write before the directory exists
    heads = {"scalar_head": chunks[0].scalar_head, "scores_steps": chunks[0].scores_steps}
    if topology.data_rank == topology.context_rank == 0:
        tensors = dict(gathered_adapters(chunks))
        head = gathered_tensors(chunks, model, only=set(HEAD))
        tensors |= {PREFIX + name: values for name, values in head}
        if topology.tensor_rank == 0:
            _write(partial / f"stage{topology.pipeline_rank:05d}.safetensors", tensors)
    torch.distributed.barrier()  # rank 0 reads the files of all stages
    if topology.rank == 0:
        files, opened = sorted(partial.glob("stage*.safetensors")), OpenFiles()
        tensors = {
            name: read_tensor(opened, file, stored)
            for file in files
            for name, stored in read_header(file).items()
        }
        expected = peft_shapes(settings, model, **heads)
        assert tensors.keys() == expected.keys(), f"{len(tensors)} tensors and not {len(expected)}"
        _write(partial / ADAPTER_MODEL, tensors)
        for file in files:
            file.unlink()
        files_beside = {ADAPTER_CONFIG: peft_config(settings, base=model.init_from, **heads)}
        for name, content in (documents(files_beside) | files_beside).items():
            (partial / name).write_bytes(content)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    torch.distributed.barrier()
    return target


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    kinds = {name: Kind(values.dtype, tuple(values.shape)) for name, values in tensors.items()}
    write_file(path, kinds, tensors.items())


def merged_weights(chunks: Sequence[Llama]) -> Callable[[Tensor], Tensor]:
    """A function from a base parameter to its values with the adapter merged in.

    The tensor-parallel ranks must call it together.
    """
    found = {id(place.linear.weight): place for chunk in chunks for place in places(chunk)}

    def value_of(parameter: Tensor) -> Tensor:
        place = found.get(id(parameter))
        return parameter.detach() if place is None else place.adapter.merged(parameter.detach())

    return value_of
