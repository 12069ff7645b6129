"""Reference log-probabilities. They are computed once, in any layout, and stored under a key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_post.config.schema import Config
from megatron_post.config.sections import Precision
from megatron_post.data.reference_writer import ReferenceWriter
from megatron_post.data.store import PackStore
from megatron_post.display import make_console
from megatron_post.parallel.context import ContextSplit, sum_over_ranks
from megatron_post.parallel.topology import Topology
from megatron_post.progress import WorkProgress
from megatron_post.storage.checksums import sha256_of_file, sha256_of_json
from megatron_post.storage.hub import model_directory
from megatron_post.storage.reading import read_object
from megatron_post.train.step import Stepper


def attach_reference(
    config: Config,
    topology: Topology,
    stores: Sequence[PackStore | None],
    *,
    digests: dict[str, str] | None = None,
) -> None:
    """Make stores return reference log-probabilities with each pack, if this run reads them from the store.

    The reference is the model that training starts from. digests: its `weights_digests`, if already computed.

    Raises `ValueError` if the config names no such model, and `StoreError` if the store has no
    log-probabilities or those of another model.
    """
    if not config.stores_reference:
        return
    if config.model.init_from is None:
        raise ValueError(
            "dpo.reference=store needs model.init_from, the model that training starts from and whose "
            "log-probabilities `megatron-post reference` has stored; or set dpo.reference=frozen"
        )
    key = reference_key(config.model.init_from, config.precision, topology, digests=digests)
    for store in stores:
        if store is not None:
            store.read_reference(key, config.dpo.trained_roles)


def weights_digests(directory: str | Path, topology: Topology) -> dict[str, str]:
    """SHA-256 of each safetensors file in a Hugging Face directory, by file name. Ranks divide the files.

    All ranks must call this function. Raises `ValueError` if there are no such files.
    """
    files = sorted(model_directory(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no safetensors files")
    own = {file.name: sha256_of_file(file) for file in files[topology.rank :: topology.world_size]}
    parts: list[Any] = [None] * topology.world_size
    torch.distributed.all_gather_object(parts, own)
    return {name: digest for part in parts for name, digest in part.items()}


def reference_key(
    directory: str | Path, precision: Precision, topology: Topology, *, digests: dict[str, str] | None = None
) -> str:
    """SHA-256 over everything that decides a model's log-probabilities: its weights, config and precision.

    directory: a Hugging Face model. digests: its `weights_digests`, if already computed. All ranks must call
    this function. The key needs no tokenizer, because the store's own settings name it. It needs no trained
    roles, because these are stored beside it.
    """
    weights = weights_digests(directory, topology) if digests is None else digests
    shape = read_object(model_directory(directory) / "config.json", "the config of a Llama")
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rms_norm_eps",
    )
    content = {
        "weights": weights,
        "model": {name: shape.get(name) for name in names},
        # How weights are kept between steps decides nothing.
        "precision": precision.model_dump(exclude={"fp8_param_gather"}),
    }
    return sha256_of_json(content)


def compute_reference(
    stepper: Stepper,
    store: PackStore,
    topology: Topology,
    *,
    key: str,
    roles: Sequence[str],
    group_size: int,
    multiple: int = 1,
) -> None:
    """Compute the log-probability of every trained label of a store's group, and write them into the store.

    All ranks must call this function. roles: those that the stage of `stepper` trains. group_size: number of
    packs that go through the pipeline together. multiple: the interleaved schedule takes a multiple of this
    number, so packs of padding are added at the end.
    """
    writer = ReferenceWriter(store)
    if topology.rank == 0:
        writer.create(key, roles)
    torch.distributed.barrier()  # the other ranks write into the files that rank 0 creates
    rounds = range(0, len(store), group_size * topology.data_size)
    what, console = (
        f"{store.group}: reference log-probabilities",
        make_console(quiet=not topology.is_reporter),
    )
    with WorkProgress(what, total=len(store), unit="packs", console=console) as progress:
        for start in rounds:
            numbers = [start + i * topology.data_size + topology.data_rank for i in range(group_size)]
            numbers = [number for number in numbers if number < len(store)]
            packs = [store.read(number) for number in numbers]
            packs += [store.empty()] * (-len(packs) % multiple)
            outputs = stepper.outputs(packs) if packs else []
            for number, (logps, batch) in zip(numbers, outputs, strict=False):
                row = _whole_pack(logps, batch.cu_seqlens, topology)
                if topology.tensor_rank == topology.context_rank == 0:
                    writer.write(number, row.cpu().numpy())
            progress.reach(min(start + rounds.step, len(store)))
    torch.distributed.barrier()  # rank 0 must not publish before every rank has written its packs
    if topology.rank == 0:
        writer.publish()
    torch.distributed.barrier()


def _whole_pack(values: Tensor, cu_seqlens: Tensor, topology: Topology) -> Tensor:
    """Combine per-token values fp32 [t / cp] of all context-parallel ranks into those of the pack, [t]."""
    group = topology.groups.cp
    whole = values.new_zeros(int(cu_seqlens[-1]))
    whole[ContextSplit(cu_seqlens, group.size()).indices(group.rank())] = values.detach()
    return sum_over_ranks(whole, group)
