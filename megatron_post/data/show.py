"""`data show` prints one pack as text, coloured by role. Trained tokens are underlined and counted."""

from collections.abc import Collection
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from megatron_post.data.store import open_store
from megatron_post.data.store_format import GroupName
from megatron_post.data.template import RESPONSE_ROLES, STEP_ROLES, TokenRole
from megatron_post.data.tokenizer import Tokenizer, load_tokenizer
from megatron_post.display import printable

_COLOURS = {
    TokenRole.PADDING: "bright_black",
    TokenRole.HEADER: "blue",
    TokenRole.PROMPT: "default",
    TokenRole.BODY: "green",
    TokenRole.TERMINATOR: "magenta",
    TokenRole.MASKED: "yellow",
    TokenRole.RIGHT_STEP: "bright_green",
    TokenRole.WRONG_STEP: "bright_red",
}


def show_pack(
    path: str | Path,
    index: int,
    *,
    console: Console,
    group: GroupName = "train",
    tokenizer_path: str | None = None,
    trained_roles: Collection[TokenRole] | None = None,
) -> None:
    """Print pack `index` of a store. Each segment has a line with its source and row, and then its text.

    trained_roles: by default those of the store's kind of examples. tokenizer_path: by default the path of
    the tokenizer that packed the store. Raises `ValueError` for a pack that does not exist, and for a
    tokenizer that did not pack the store.
    """
    store = open_store(path, group)
    if not 0 <= index < len(store):
        raise ValueError(
            f"pack {index} does not exist: {path}/{group} has {len(store)} packs, counted from 0"
        )
    tokenizer = load_tokenizer(
        tokenizer_path or store.settings.tokenizer_path, content_tokens=store.settings.content_tokens
    )
    if tokenizer.fingerprint != store.settings.tokenizer_fingerprint:
        raise ValueError(
            f"store {path} was made with tokenizer {store.settings.tokenizer_fingerprint:.12}, the one at "
            f"{tokenizer_path or store.settings.tokenizer_path} is {tokenizer.fingerprint:.12}; "
            "name the right one"
        )
    if trained_roles is None:
        trained_roles = STEP_ROLES if store.settings.layout == "steps" else RESPONSE_ROLES
    pack = store.read(index)
    console.print(_legend(trained_roles))
    bounds = zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True)
    for number, (start, end) in enumerate(bounds):
        source = pack.sources[number]
        if source < 0:
            end = len(pack.tokens)  # the padding is several segments
        name = f"{store.sources[source].name}, row {pack.sample_ids[number]}" if source >= 0 else "padding"
        trained = int(np.isin(pack.roles[start:end], list(trained_roles)).sum())
        title = Text(printable(f"{number}: {name}, tokens {start}-{end - 1}, {trained} trained"))
        console.rule(title, align="left")
        console.print(
            _text(pack.tokens[start:end].tolist(), pack.roles[start:end].tolist(), tokenizer, trained_roles)
        )
        if source < 0:
            break


def _text(
    tokens: list[int], roles: list[int], tokenizer: Tokenizer, trained_roles: Collection[TokenRole]
) -> Text:
    """The text of a segment. Runs of a role are decoded whole, as a character may span tokens."""
    text = Text()
    for role, run in groupby(zip(tokens, roles, strict=True), key=lambda pair: TokenRole(pair[1])):
        ids = [token for token, _ in run]
        shown = f"[padding: {len(ids)}]" if role == TokenRole.PADDING else tokenizer.decode(ids)
        text.append(printable(shown), Style(color=_COLOURS[role], underline=role in trained_roles))
    return text


def _legend(trained_roles: Collection[TokenRole]) -> Text:
    text = Text()
    for role, colour in _COLOURS.items():
        text.append(role.name.lower(), Style(color=colour, underline=role in trained_roles)).append("  ")
    return text.append("(underlined: trained)")
