"""Checks that the packed data has the sources that the config names, and something to train on."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_post.config.schema import Config
from megatron_post.config.settings import flatten
from megatron_post.data.pack import Pack
from megatron_post.data.sources import packed_sources
from megatron_post.data.store import PackStore, StoreError
from megatron_post.parallel.topology import Topology
from megatron_post.stages.base import Stage


def check_sources(config: Config, store: PackStore) -> None:
    """Raises `StoreError` if a group of the store has other sources than the config names for it.

    A config that names no training sources accepts any store.
    """
    key = {"train": "data.sources", "eval": "data.eval_sources"}[store.group]
    templates = {source.name: source.template_digest for source in packed_sources(config, store.group)}
    held_templates = {source.name: source.template for source in store.sources}
    named, held = set(templates), set(held_templates)
    name = f"store {store.path}/{store.group}"
    if missing := sorted(named - held):
        raise StoreError(
            f"{key} names {', '.join(missing)}, which {name} does not hold (it holds "
            f"{', '.join(sorted(held)) or 'nothing'}); run `megatron-post data pack`, or leave it out"
        )
    if named and (extra := sorted(held - named)):
        raise StoreError(
            f"{name} holds {', '.join(extra)}, which {key} does not name; add it there, or pack a store "
            "without it"
        )
    if changed := sorted(n for n in named & held if templates[n] != held_templates[n]):
        raise StoreError(
            f"{name} was packed with another text of the template(s) {', '.join(changed)}; run "
            "`megatron-post data pack`, or restore the text"
        )
    if named and not len(store):
        raise StoreError(f"{key} names {', '.join(sorted(named))}, and {name} has no pack of it")


def check_trained(
    config: Config, stage: Stage, stores: Iterable[PackStore | None], topology: Topology
) -> None:
    """Raises `StoreError` on all ranks if a store has no trained token, no labelled step or no pair.

    Only the held-out packs that are evaluated count. All ranks must call this function. Rank 0 reads packs of
    each store until it finds one that has something to train, and sends the result to the others.
    """
    reasons: list[Any] = [None]
    if topology.rank == 0:
        try:
            for store in stores:
                if store is not None:
                    _check_trained(config, stage, store)
        except (ValueError, OSError) as error:
            reasons = [error]
    torch.distributed.broadcast_object_list(reasons, src=0)
    if reasons[0] is not None:
        raise reasons[0]


def _check_trained(config: Config, stage: Stage, store: PackStore) -> None:
    count = min(len(store), config.train.eval_packs) if store.group == "eval" else len(store)
    if any(_is_trained(store.read(number), stage) for number in range(count)):
        return
    key = config.traits.trained_roles
    untrained = {"steps": "no labelled step", "documents": "no document"}.get(
        config.traits.examples, "no pair"
    )
    what = untrained if key is None else f"no token with {key}=[{','.join(flatten(config)[key])}]"
    raise StoreError(
        f"store {store.path}/{store.group} has {what} in any of its {count} packs, so there is nothing to "
        f"{'train' if store.group == 'train' else 'evaluate'}; `megatron-post data stats {store.path}` shows "
        "what it holds"
    )


def _is_trained(pack: Pack, stage: Stage) -> bool:
    batch = stage.collate(pack)
    has_pairs = batch.comparisons is None or bool(batch.comparisons.examples > 0)
    return has_pairs and bool(batch.trained.any())
