"""Builds byte-level BPE tokenizers, from Meta's `tokenizer.model` or by training on texts."""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from megatron_post.data.special_tokens import BOS, USED_SPECIAL_TOKENS, llama31_special_tokens
from megatron_post.storage.reading import reading

# The regular expression of Meta's tokenizer.py that splits text. Digits form groups of up to `digits`.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe_from_meta(path: Path) -> Backend:
    """The tokenizer of Meta's `tokenizer.model`, with the ids of Llama 3.1. Raises `ValueError`."""
    return _from_ranks(_read_ranks(path))


def trained_bpe(texts: Iterable[str], vocab_size: int) -> Backend:
    """A tokenizer as `train_small_tokenizer` describes it."""
    smallest = 256 + len(USED_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small: bytes and special tokens need {smallest}")
    backend = _byte_level(models.BPE(), digits=1)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in USED_SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _with_bos(backend)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token's bytes, from tiktoken's format. A line is a base64 token and its rank."""
    ranks = {}
    with reading(path):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"tokenizer.path={path}:{number} is not Llama 3's format (base64 token and rank); "
                "a SentencePiece model of Llama 2 cannot be used"
            ) from None
    return ranks


def _from_ranks(ranks: dict[bytes, int]) -> Backend:
    """A byte-level BPE with tiktoken's ids.

    tiktoken always merges the two neighbours that form the token of lowest rank. So every split of a token
    into two tokens is a merge, and merges are in the order of the token's rank.
    """
    letters = _byte_letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text[left], text[right]) for left, right in pairs]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    # With ignore_merges a word that is in the vocabulary becomes one token without merges, as in tiktoken.
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True), digits=3)
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in llama31_special_tokens()]
    )
    return _with_bos(backend)


def _byte_letters() -> list[str]:
    """The printable character that represents each byte in byte-level vocabularies (GPT-2's table)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(model: models.BPE, *, digits: int) -> Backend:
    backend = Backend(model)
    split = Regex(_SPLIT.format(digits=f"{{1,{digits}}}"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_bos(backend: Backend) -> Backend:
    """Add a post-processor, as in Meta's tokenizer.json, that puts begin-of-text before plain text.

    `transformers` and vLLM use it. Our own `encode` does not.
    """
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend
