"""Checks a run against its machine, and opens its tokenizer, stores and loader."""

import torch

from megatron_post.config.layout import segment_multiple, store_layout, world_errors
from megatron_post.config.load import raise_for
from megatron_post.config.schema import Config
from megatron_post.data.dali import DaliLoader
from megatron_post.data.loader import PackLoader
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import GroupName
from megatron_post.data.tokenizer import Tokenizer, tokenizer_of
from megatron_post.models.specs import has_transformer_engine, transformer_engine_version
from megatron_post.parallel.topology import Topology, rank_from_environment
from megatron_post.train.checkpoint import Position
from megatron_post.train.data_checks import check_sources
from megatron_post.train.trackers import missing_trackers


def check_run(config: Config) -> Tokenizer:
    """Check a config against the ranks that it runs on. Raises `ConfigError` with every error found."""
    errors = rank_errors(config, world_size=rank_from_environment()[1])
    tokenizer = tokenizer_of(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        errors.append(
            f"the tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} ids, "
            f"more than model.vocab_size={config.model.vocab_size}"
        )
    raise_for([*errors, *missing_trackers(config)])
    return tokenizer


def rank_errors(config: Config, *, world_size: int) -> list[str]:
    """Reasons why this config cannot run on `world_size` ranks of this machine's kind. Empty if it can."""
    has_gpu, local_rank = torch.cuda.is_available(), rank_from_environment()[2]
    if has_gpu and local_rank >= (count := torch.cuda.device_count()):
        return [
            f"this is local rank {local_rank}, counted from 0, and it sees {count} GPUs; start at most one "
            "rank for each GPU of a node, or show it more in CUDA_VISIBLE_DEVICES"
        ]
    return world_errors(
        config,
        world_size=world_size,
        has_gpu=has_gpu,
        has_transformer_engine=has_transformer_engine(),
        capability=torch.cuda.get_device_capability(local_rank) if has_gpu else None,
        cuda=torch.version.cuda,
        transformer_engine=transformer_engine_version(),
    )


def open_stores(config: Config, tokenizer: Tokenizer) -> tuple[PackStore, PackStore | None]:
    """Open the packed training data, and the held-out data if `data.eval_sources` names any.

    Raises `StoreError` if a store does not fit the config, or has other sources than the config names.
    """

    def opened(group: GroupName) -> PackStore:
        store = open_store(
            config.data.store,
            group,
            pack_length=config.data.pack_length,
            segment_multiple=segment_multiple(config),
            tokenizer_fingerprint=tokenizer.fingerprint,
            layout=store_layout(config),
            reasoning=config.data.reasoning,
            vocab_size=config.model.vocab_size,
        )
        check_sources(config, store)
        return store

    return opened("train"), opened("eval") if config.data.eval_sources else None


def open_loader(
    config: Config, store: PackStore, topology: Topology, start: Position
) -> PackLoader | DaliLoader:
    """This rank's stream of packs from `start` on, read by the backend that the config names."""
    loader = PackLoader(
        store,
        seed=config.seed,
        global_batch=config.train.global_batch,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        prefetch=config.data.prefetch,
        consumed_packs=start.consumed_packs,
    )
    if config.data.backend == "torch":
        return loader
    return DaliLoader(loader, device_id=topology.device.index, prefetch=config.data.prefetch)
