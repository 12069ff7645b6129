"""Rows of a run as `data pack` packs them."""

from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_post.config.load import validate
from megatron_post.data.build import build_store
from megatron_post.data.store import open_store

LONGEST = 131_072


def pack(directory: Path, rows: Path, tokenizer: Path) -> list[np.ndarray]:
    """The tokens of each dialog, from packs of 128K tokens."""
    config = validate(
        {
            "stage": "sft",
            "run_dir": str(directory / "training"),
            "model": {"preset": "tiny"},
            "train": {"steps": 1, "global_batch": 1},
            "tokenizer": {"path": str(tokenizer)},
            "data": {
                "store": str(directory / "store"),
                "pack_length": LONGEST,
                "overlong": "error",
                "sources": [{"name": "long", "path": str(rows)}],
            },
        },
        origin="test",
    )
    build_store(config, console=Console(quiet=True))
    store = open_store(directory / "store", "train")
    packs = [store.read(number) for number in range(len(store))]
    return [
        found.tokens[start : start + length]
        for found in packs
        for start, length, source in zip(found.cu_seqlens[:-1], found.lengths, found.sources, strict=True)
        if source >= 0
    ]
