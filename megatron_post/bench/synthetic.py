"""Packed stores of random tokens, with the lengths of real post-training data."""

from pathlib import Path
from typing import get_args

import numpy as np

from megatron_post.config.layout import segment_multiple, store_layout
from megatron_post.config.schema import Config
from megatron_post.data.assembly import assemble
from megatron_post.data.reference_writer import ReferenceWriter
from megatron_post.data.store import PackStore, open_store
from megatron_post.data.store_format import (
    DOCUMENTS,
    ONE_SEGMENT,
    SEPARATE,
    SourceCounts,
    StoreLayout,
    StoreSettings,
)
from megatron_post.data.store_writer import StoreWriter
from megatron_post.data.template import Rendered, TokenRole
from megatron_post.data.units import UnitPile

# Share of examples in percent and mean tokens of each source in the SFT mix of "The Llama 3 Herd of Models".
LLAMA3_MIX = (
    (52.66, 974.0), (14.89, 753.3), (3.01, 520.5), (8.14, 297.8), (21.19, 661.6), (0.11, 38135.6)
)  # fmt: skip
MEAN_LENGTH = sum(share * mean for share, mean in LLAMA3_MIX) / sum(share for share, _ in LLAMA3_MIX)
# The share of a dialog's tokens that is context. In that mix it is 535.7 of 846.1.
CONTEXT_SHARE = 0.633
SHORTEST = 8
REFERENCE_KEY = "synthetic"
# A pack shorter than this would hold only a dialog or two of the mix, so lengths shrink with it.
_WHOLE = 8192


def long_tailed_lengths(count: int, *, capacity: int, seed: int = 0) -> np.ndarray:
    """int64 [count]: log-normal lengths (sigma 1) about the mean of each source of Llama 3's SFT mix.

    Lengths are clipped to `capacity`. The mean of a log-normal is exp(mu + sigma^2 / 2).
    """
    draw = np.random.default_rng(seed)
    shares, means = np.array(LLAMA3_MIX).T
    mu = np.log(means) - 0.5
    source = draw.choice(len(shares), size=count, p=shares / shares.sum())
    return np.clip(draw.lognormal(mu[source], 1.0), SHORTEST, capacity).astype(np.int64)


def write_synthetic(directory: Path, config: Config, *, packs: int) -> PackStore:
    """A store of at least about `packs` packs that the config can train on, the same on every machine.

    Pairs are a prompt and two responses. With `dpo.reference=store` they get constant log-probabilities under
    `REFERENCE_KEY`. Raises `ValueError` if packs are too short for a pair.
    """
    layout = store_layout(config)
    settings = StoreSettings(
        pack_length=config.data.pack_length,
        segment_multiple=segment_multiple(config),
        tokenizer_fingerprint=REFERENCE_KEY,
        pad_id=0,
        seed=config.seed,
        layout=next(name for name in get_args(StoreLayout) if name == layout),
    )
    capacity, scale = settings.pack_length, min(1.0, settings.pack_length / _WHOLE)
    if layout not in ONE_SEGMENT:
        # A pair needs room for two responses, the second up to 1.5 times as long, two prompts, and padding.
        capacity = capacity * 2 // 5 - 2 * settings.segment_multiple
    if capacity < SHORTEST:
        raise ValueError(f"data.pack_length={settings.pack_length} is too short for pairs of random tokens")
    # Tokens of a unit relative to a dialog. A pair has a second response and, in the separate layout, the
    # prompt twice.
    pair = 2.0 if layout == "separate" else 2.0 - CONTEXT_SHARE
    times = 1.0 if layout in ONE_SEGMENT else pair
    count = 16 + int(packs * settings.pack_length / (MEAN_LENGTH * scale * times))
    lengths = np.maximum(long_tailed_lengths(count, capacity=int(capacity / scale)) * scale, SHORTEST)
    store = write_random_store(
        directory, settings, lengths.astype(np.int64), vocab_size=config.model.vocab_size
    )
    if config.stores_reference:
        writer = ReferenceWriter(store)
        writer.create(REFERENCE_KEY, config.dpo.trained_roles)
        row = np.full(settings.pack_length, -np.log(config.model.vocab_size), np.float32)
        for pack in range(len(store)):
            writer.write(pack, row)
        writer.publish()
    return open_synthetic(directory, config)


def open_synthetic(directory: Path, config: Config) -> PackStore:
    """The store that `write_synthetic` wrote for this config."""
    store = open_store(directory, "train")
    if config.stores_reference:
        store.read_reference(REFERENCE_KEY)
    return store


def write_random_store(
    directory: Path, settings: StoreSettings, lengths: np.ndarray, *, vocab_size: int
) -> PackStore:
    """Write dialogs or pairs of random tokens, packed as `data pack` packs them.

    lengths: int64 [n], tokens of the prompt and one response.
    """
    pile, draw = UnitPile(), np.random.default_rng(settings.seed)
    for sample, length in enumerate(lengths.tolist()):
        unit = _unit(length, settings.layout, draw, vocab_size)
        pile.add(unit, source=0, sample=sample, turns=1)
    assembly = assemble(pile.units(), np.arange(len(pile)), "train", settings)
    with StoreWriter(directory, settings) as writer:
        writer.write(
            "train",
            sources=[SourceCounts("random", rows=len(pile))],
            columns=assembly.columns(),
            segments_per_pack=np.diff(assembly.segment_ends),
            packs=assembly.packs(),
        )
    return open_store(directory, "train")


def _unit(length: int, layout: StoreLayout, draw: np.random.Generator, vocab_size: int) -> list[Rendered]:
    # A document is trained after its begin-of-text.
    context = 1 if layout in DOCUMENTS else min(max(1, round(length * CONTEXT_SHARE)), length - 2)
    sizes = [length - context]
    if layout not in ONE_SEGMENT:
        sizes.append(max(2, round(sizes[0] * draw.uniform(0.5, 1.5))))
    prompt = np.full(context, TokenRole.PROMPT, np.uint8)
    prompt[0] = TokenRole.HEADER
    responses = [np.array([TokenRole.BODY] * (n - 1) + [TokenRole.TERMINATOR], np.uint8) for n in sizes]
    if layout == "steps":  # a label at every 32nd token, and at the end of the text
        for response in responses:
            response[-2::-32] = TokenRole.RIGHT_STEP
    if layout in SEPARATE:
        roles = [np.concatenate((prompt, response)) for response in responses]
        ranks = [-1] if layout in ONE_SEGMENT else [0, 1]
    else:
        if layout == "isolated_pairs":
            responses = [np.concatenate((prompt[-1:], response)) for response in responses]
            prompt = prompt[:-1]
        roles, ranks = [prompt, *responses], [-1, 0, 1]
    return [
        Rendered(draw.integers(0, vocab_size, len(each), dtype=np.int32), each, rank)
        for each, rank in zip(roles, ranks, strict=True)
    ]
