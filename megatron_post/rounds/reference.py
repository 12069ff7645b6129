"""`megatron-post reference` writes a model's log-probabilities of a store's tokens for DPO."""

from collections.abc import Sequence
from pathlib import Path

from megatron_post.config.layout import microbatch_multiple, segment_multiple, store_layout
from megatron_post.config.load import ConfigError
from megatron_post.data.store import open_store
from megatron_post.data.store_format import StoreLayout
from megatron_post.data.store_metadata import read_settings
from megatron_post.rounds.trained_model import config_of_model, running_model
from megatron_post.train.reference import compute_reference, reference_key


def write_reference(store: str | Path, model: str | Path, overrides: Sequence[str] = ()) -> None:
    """Compute the log-probabilities of both groups of a store with a Hugging Face model, in any layout.

    `precision` must be that of the training run, so that policy and reference agree at step 0. Only tokens
    of `dpo.trained_roles` are computed.

    Raises `ValueError` for a store without pairs, and if store, tokenizer and layout do not fit together.
    """
    settings = read_settings(store)
    layouts: dict[StoreLayout, str] = {"separate": "separate", "isolated_pairs": "isolated"}
    if settings.layout not in layouts:
        raise ConfigError(f"store {store} holds {settings.layout}, not pairs; pack it with stage=dpo")
    values = {
        "stage": "dpo",
        "dpo": {"layout": layouts[settings.layout]},
        "tokenizer": {"path": settings.tokenizer_path, "content_tokens": settings.content_tokens},
        "data": {
            "store": str(store),
            "pack_length": settings.pack_length,
            "reasoning": settings.reasoning,
        },
    }
    config = config_of_model(model, values, overrides)
    with running_model(config) as (stepper, _, topology):
        key = reference_key(model, config.precision, topology)
        for group in ("train", "eval"):
            packs = open_store(
                store,
                group,
                segment_multiple=segment_multiple(config),
                layout=store_layout(config),
            )
            if len(packs):
                compute_reference(
                    stepper,
                    packs,
                    topology,
                    key=key,
                    roles=config.dpo.trained_roles,
                    group_size=2 * config.parallel.pipeline,
                    multiple=microbatch_multiple(config),
                )
