"""Writes a Hugging Face directory from the ranks of a run.

Each pipeline stage writes its own files, and its data-parallel replicas share the work.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.convert.configs import index_of, written_configs
from megatron_post.convert.hf_directory import INDEX
from megatron_post.convert.hf_reader import layer_offset
from megatron_post.convert.mapping import Rule, hf_from_shards, hf_shapes, rule_for
from megatron_post.convert.safetensors_file import write_file
from megatron_post.convert.shards import SHARD_BYTES, plan_shards, shard_name
from megatron_post.convert.source import Kind
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.models.adapted import base_parameters
from megatron_post.models.llama import Llama
from megatron_post.parallel.topology import Topology


def export_hf(
    chunks: list[Llama],
    model: Model,
    tokenizer: Tokenizer,
    topology: Topology,
    directory: str | Path,
    *,
    value_of: Callable[[Tensor], Tensor] = Tensor.detach,
    documents: Callable[[dict[str, bytes]], dict[str, bytes]] = lambda companions: {},
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write model, config and tokenizer so that plain `transformers` loads them. All ranks must call it.

    The files of a pipeline stage are distributed over its data- and context-parallel replicas. A rank holds
    one parameter at a time, gathered over the tensor-parallel ranks, and writes it to its final place in the
    file. The directory is renamed to its name when it is complete. value_of: takes a parameter to the values
    that are exported. documents: called by rank 0 with the configs and the tokenizer, returns further files.
    """
    target = Path(directory)
    partial = target.with_name(f".partial-{target.name}")
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()  # no rank may write before the directory exists
    kinds = _kinds(chunks, model)
    shards = plan_shards(kinds, max_bytes=max_shard_bytes)
    context_size = topology.groups.cp.size()
    replica = topology.data_rank * context_size + topology.context_rank
    names: dict[str, list[str]] = {}
    for i in range(replica, len(shards), topology.data_size * context_size):
        file_name = f"stage{topology.pipeline_rank:05d}-{i:05d}"
        names[file_name] = shards[i]
        tensors = gathered_tensors(chunks, model, value_of=value_of, only=set(shards[i]))
        if topology.tensor_rank == 0:
            write_file(partial / file_name, {name: kinds[name] for name in shards[i]}, tensors)
        else:
            # Gathering is a collective, so the other tensor-parallel ranks must iterate as well.
            for _ in tensors:
                pass
    # Every rank has flushed its files when this gather returns, so rank 0 may publish the directory.
    gathered: list[Any] = [None] * topology.world_size
    torch.distributed.all_gather_object(gathered, (names, kinds))
    if topology.rank == 0:
        _finish(partial, gathered, model, tokenizer, chunks[0], documents)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    torch.distributed.barrier()
    return target


def gathered_tensors(
    chunks: list[Llama],
    model: Model,
    *,
    value_of: Callable[[Tensor], Tensor] = Tensor.detach,
    only: set[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """This stage's tensors in Hugging Face's layout, one at a time, on the CPU of tensor rank 0.

    All tensor-parallel ranks must iterate to the end, because each step is a collective. Only the first rank
    receives tensors. value_of: takes a parameter to the tensor that is gathered, such as its values or its
    gradient. only: the names that are requested.
    """
    for chunk, parameter, rule, names in _parameters(chunks, model):
        if only is not None and only.isdisjoint(names):
            continue
        group, value = chunk.pg_collection.tp, value_of(parameter)
        shards = [value]
        if group.size() > 1 and rule.layout != "replicated":
            shards = [torch.empty_like(value) for _ in range(group.size())]
            torch.distributed.all_gather(shards, value.contiguous(), group=group)
        if group.rank() == 0:
            tensors = hf_from_shards(rule, names, [s.cpu() for s in shards], model)
            yield from ((name, tensor) for name, tensor in tensors.items() if only is None or name in only)


def _parameters(chunks: list[Llama], model: Model) -> Iterator[tuple[Llama, Tensor, Rule, tuple[str, ...]]]:
    """The parameters that this stage exports, each with its rule and names."""
    for chunk in chunks:
        for name, parameter in base_parameters(chunk):
            rule, names = rule_for(name, layer_offset=layer_offset(chunk), scalar_head=chunk.scalar_head)
            if model.tie_word_embeddings and not chunk.pre_process and rule.layout == "vocabulary":
                continue  # the first stage writes tied embeddings
            yield chunk, parameter, rule, names


def _kinds(chunks: list[Llama], model: Model) -> dict[str, Kind]:
    """Names, dtypes and shapes of this stage's tensors, in the order of `transformers`' state dict."""
    dtypes = {
        name: parameter.dtype for _, parameter, _, names in _parameters(chunks, model) for name in names
    }
    shapes = hf_shapes(model, scalar_head=chunks[0].scalar_head, scores_steps=chunks[0].scores_steps)
    return {name: Kind(dtypes[name], shape) for name, shape in shapes.items() if name in dtypes}


def _finish(
    directory: Path,
    gathered: list[tuple[dict[str, list[str]], dict[str, Kind]]],
    model: Model,
    tokenizer: Tokenizer,
    chunk: Llama,
    documents: Callable[[dict[str, bytes]], dict[str, bytes]],
) -> None:
    """Rename the files to Hugging Face's numbering, and write the index, the configs and the tokenizer.

    chunk: any chunk of the model, which says what its head is.
    """
    head = {"scalar_head": chunk.scalar_head, "scores_steps": chunk.scores_steps}
    files = {file: names for part, _ in gathered for file, names in part.items()}
    kinds = {name: kind for _, part in gathered for name, kind in part.items()}
    weight_map = {}
    for number, (old, names) in enumerate(sorted(files.items())):
        new = shard_name(number, len(files))
        (directory / old).rename(directory / new)
        weight_map.update(dict.fromkeys(names, new))
    shapes = hf_shapes(model, **head)
    assert set(weight_map) == set(shapes), f"exported {len(weight_map)} tensors, the model has {len(shapes)}"
    (dtype,) = {kind.dtype for kind in kinds.values()}
    companions = written_configs(model, tokenizer, dtype=dtype, **head)
    companions = documents(companions) | companions
    if len(files) > 1:
        companions[INDEX] = index_of(weight_map, kinds)
    for name, content in companions.items():
        (directory / name).write_bytes(content)
