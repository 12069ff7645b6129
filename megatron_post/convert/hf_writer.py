"""A Hugging Face directory from the ranks of a run: every pipeline stage writes its own shard files."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_post.config.schema import Model
from megatron_post.convert.hf_reader import layer_offset
from megatron_post.convert.mapping import hf_from_shards, hf_shapes, rule_for
from megatron_post.data.tokenizer import Tokenizer
from megatron_post.models.hf_config import to_hf_config
from megatron_post.models.llama import Llama
from megatron_post.parallel.topology import Topology

SHARD_BYTES = 5 * 1024**3


def export_hf(
    chunks: list[Llama], model: Model, tokenizer: Tokenizer, topology: Topology, directory: str | Path
) -> Path:
    """Write model, config and tokenizer so that plain `transformers` loads them. All ranks call it.

    Tensors are gathered one at a time over tensor-parallel ranks, to the first data- and context-parallel
    replica only, and written in files of up to 5 GiB. The directory appears under its name when it is
    complete.
    """
    target = Path(directory)
    partial = target.with_name(f".partial-{target.name}")
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    files: dict[str, list[str]] = {}
    writes = topology.data_rank == 0 and topology.context_rank == 0
    if writes:
        tensors = gathered_tensors(chunks, model)
        if topology.tensor_rank == 0:
            files = _write_shards(tensors, partial, prefix=f"stage{topology.pipeline_rank}")
        else:
            for _ in tensors:
                pass
    gathered: list[Any] = [None] * topology.world_size
    torch.distributed.all_gather_object(gathered, files)
    if topology.rank == 0:
        files = {name: names for part in gathered for name, names in part.items()}
        _finish(partial, files, model, tokenizer, scalar_head=chunks[0].scalar_head)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    torch.distributed.barrier()
    return target


def gathered_tensors(
    chunks: list[Llama], model: Model, *, value_of: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """This stage's tensors in Hugging Face's layout, one at a time, on the CPU of tensor rank 0.

    All tensor-parallel ranks must run through it; those but the first are yielded nothing. `value_of` takes a
    parameter to what is gathered: its values, or its gradient.
    """
    for chunk in chunks:
        group = chunk.pg_collection.tp
        for name, parameter in chunk.named_parameters():
            rule, names = rule_for(name, layer_offset=layer_offset(chunk), scalar_head=chunk.scalar_head)
            if model.tie_word_embeddings and not chunk.pre_process and rule.layout == "vocabulary":
                continue  # the last stage's copy of tied embeddings; the first stage writes them
            value = value_of(parameter)
            shards = [value]
            if group.size() > 1 and rule.layout != "replicated":
                shards = [torch.empty_like(value) for _ in range(group.size())]
                torch.distributed.all_gather(shards, value.contiguous(), group=group)
            if group.rank() == 0:
                yield from hf_from_shards(rule, names, [s.cpu() for s in shards], model).items()


def _write_shards(
    tensors: Iterator[tuple[str, Tensor]], directory: Path, *, prefix: str
) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    pending: dict[str, Tensor] = {}
    held = 0

    def flush() -> None:
        nonlocal pending, held
        name = f"model-{prefix}-{len(files):05d}.safetensors"
        save_file(pending, directory / name, metadata={"format": "pt"})
        files[name] = list(pending)
        pending, held = {}, 0

    for name, tensor in tensors:
        if pending and held + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        held += tensor.nbytes
    if pending:
        flush()
    return files


def _finish(
    directory: Path, files: dict[str, list[str]], model: Model, tokenizer: Tokenizer, *, scalar_head: bool
) -> None:
    """Rename shards to Hugging Face's numbering, write the index, the configs and the tokenizer."""
    shapes = hf_shapes(model, scalar_head=scalar_head)
    weight_map, dtypes = {}, set()
    for number, (old, names) in enumerate(sorted(files.items()), start=1):
        new = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        (directory / old).rename(directory / new)
        weight_map.update(dict.fromkeys(names, new))
        dtypes.add(_dtype_of(directory / new))
    assert set(weight_map) == set(shapes), f"exported {len(weight_map)} tensors, the model has {len(shapes)}"
    (dtype,) = dtypes
    if len(files) > 1:
        elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        index = {
            "metadata": {"total_size": elements * getattr(torch, dtype).itemsize},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    eos_ids = tokenizer.stop_ids
    config = to_hf_config(
        model,
        dtype=dtype,
        bos_id=tokenizer.bos_id,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_id,
        scalar_head=scalar_head,
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_ids, "pad_token_id": tokenizer.pad_id}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save(directory)


def _dtype_of(path: Path) -> str:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    (kind,) = kinds
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}[kind]
