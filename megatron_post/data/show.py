"""`data show`: one pack as text, coloured by role, the trained tokens underlined."""

from collections.abc import Collection
from itertools import groupby

from rich.console import Console
from rich.style import Style
from rich.text import Text

from megatron_post.data.store import PackStore
from megatron_post.data.template import TokenRole
from megatron_post.data.tokenizer import Tokenizer

_COLOURS = {
    TokenRole.PADDING: "bright_black",
    TokenRole.HEADER: "blue",
    TokenRole.PROMPT: "default",
    TokenRole.BODY: "green",
    TokenRole.TERMINATOR: "magenta",
}
_TRAINED = (TokenRole.BODY, TokenRole.TERMINATOR)


def show_pack(
    store: PackStore,
    index: int,
    tokenizer: Tokenizer,
    console: Console,
    *,
    trained_roles: Collection[TokenRole] = _TRAINED,
) -> None:
    """Print pack `index`: a rule with source and row before each segment, then its text; padding as a count.

    Raises `ValueError` for a pack that the store has not, and for another tokenizer than the store's.
    """
    if not 0 <= index < len(store):
        raise ValueError(
            f"pack {index} does not exist: {store.path}/{store.group} has {len(store)} packs, counted from 0"
        )
    if tokenizer.fingerprint != store.settings.tokenizer_fingerprint:
        raise ValueError(
            f"store {store.path} was made with tokenizer {store.settings.tokenizer_fingerprint:.12}, this one is "
            f"{tokenizer.fingerprint:.12}; set tokenizer.path to the one that `data pack` used"
        )
    pack = store.read(index)
    console.print(_legend(trained_roles))
    bounds = zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True)
    for number, (start, end) in enumerate(bounds):
        source = pack.sources[number]
        name = f"{store.sources[source].name}, row {pack.sample_ids[number]}" if source >= 0 else "padding"
        console.rule(f"{number}: {name}, tokens {start}-{end - 1}", align="left")
        console.print(
            _text(pack.tokens[start:end].tolist(), pack.roles[start:end].tolist(), tokenizer, trained_roles)
        )


def _text(
    tokens: list[int], roles: list[int], tokenizer: Tokenizer, trained_roles: Collection[TokenRole]
) -> Text:
    """Runs of one role are decoded together, so that characters of several tokens stay whole."""
    text = Text()
    for role, run in groupby(zip(tokens, roles, strict=True), key=lambda pair: TokenRole(pair[1])):
        ids = [token for token, _ in run]
        shown = f"[padding: {len(ids)}]" if role == TokenRole.PADDING else tokenizer.decode(ids)
        text.append(shown, Style(color=_COLOURS[role], underline=role in trained_roles))
    return text


def _legend(trained_roles: Collection[TokenRole]) -> Text:
    text = Text()
    for role, colour in _COLOURS.items():
        text.append(role.name.lower(), Style(color=colour, underline=role in trained_roles)).append("  ")
    return text.append("(underlined: trained)")
