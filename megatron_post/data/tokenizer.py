"""Llama 3's tokenizer on the `tokenizers` library. It can be loaded from files or trained on a small text."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from megatron_post.config.data import Reasoning
from megatron_post.config.schema import Config
from megatron_post.data.byte_level import bpe_from_meta, trained_bpe
from megatron_post.data.chat_template import chat_template
from megatron_post.data.dialog import THINK
from megatron_post.data.special_tokens import (
    BOS,
    END_OF_MESSAGE,
    END_OF_TEXT,
    END_OF_TURN,
    PAD,
    USED_SPECIAL_TOKENS,
)
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.hub import model_directory
from megatron_post.storage.reading import plain_file


class Tokenizer:
    """Encodes text to ids and decodes ids.

    A special token that is spelled in a text is encoded as text. Only `special` gives the ids of control
    tokens. Added tokens that are not special are recognized in text, and `content_tokens` lists them.
    reasoning: how the saved chat template handles reasoning.
    """

    def __init__(self, backend: Backend, *, reasoning: Reasoning = "refuse") -> None:
        # A text that spells a control token is encoded as text. Otherwise it could end its own message.
        # Settings for truncation and padding in tokenizer.json would change the ids of training.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._reasoning = backend, reasoning
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: number for number, token in added.items() if token.special}
        self.content_tokens = tuple(token.content for token in added.values() if not token.special)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin-of-text. Raises `ValueError` if the tokenizer cannot split it."""
        with _panics_explained():
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` returns them. It uses all cores."""
        with _panics_explained():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def places(self, text: str) -> list[tuple[int, int]]:
        """For each id that `encode` gives, its first character in `text` and the one behind its last.

        Tokens that are parts of one character have the place of this character. White space before a word may
        lie between two places. Raises `ValueError` as `encode`.
        """
        with _panics_explained():
            return self._backend.encode(text, add_special_tokens=False).offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`. Control tokens are spelled, or left out with `skip_special`."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def spelled(self, texts: Iterable[str]) -> Counter[str]:
        """How often the texts spell each special token. `encode` treats these spellings as text."""
        return Counter(name for text in texts for name in self._any_special.findall(text))

    @cached_property
    def _any_special(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def special(self, name: str) -> int:
        """Id of the control token `name`. Raises `ValueError` if this tokenizer has none."""
        try:
            return self._special[name]
        except KeyError:
            raise ValueError(
                f"the tokenizer has no special token {name!r}, which Llama 3's format needs here; "
                "use the tokenizer of an instruct model (Llama 3.1 for tool calls)"
            ) from None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, including special tokens. A tokenizer may have gaps in its ids."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def bos_id(self) -> int:
        return self.special(BOS)

    @property
    def pad_id(self) -> int:
        """The id of <|finetune_right_pad_id|>, or in Llama 3.0, which has none, of <|end_of_text|>.

        The role PADDING distinguishes padding from an end of text.
        """
        return self.special(PAD if PAD in self._special else END_OF_TEXT)

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end generation. They are end of text, of message and of turn, if they exist."""
        stops = (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN)
        return [self._special[name] for name in stops if name in self._special]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that affects ids, which is vocabulary, merges, special tokens and split."""
        state = json.loads(self._backend.to_str())
        decisive = {key: state[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return sha256_of_json(decisive)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which plain `transformers.AutoTokenizer` loads.

        Its `apply_chat_template` gives the ids of `template.render`, or raises an error (see
        `chat_template`).
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        names = {number: name for name, number in self._special.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": END_OF_TURN,
            "pad_token": names[self.pad_id],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": chat_template(control_tokens=list(self._special), reasoning=self._reasoning),
        }
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )


def tokenizer_of(config: Config, *, beside: Path = Path()) -> Tokenizer:
    """The tokenizer of a run. beside: the directory that a relative path starts from.

    Raises `ValueError` as `load_tokenizer` does, and if rendered reasoning would spell special tokens.
    """
    settings, reasoning = config.tokenizer, config.data.reasoning
    tokenizer = load_tokenizer(
        beside / model_directory(settings.path), content_tokens=settings.content_tokens, reasoning=reasoning
    )
    if reasoning == "render" and (special := list(tokenizer.spelled(THINK))):
        raise ValueError(
            f"data.reasoning=render writes {' and '.join(special)}, which are special tokens of "
            f"tokenizer.path={settings.path}; name them in tokenizer.content_tokens"
        )
    return tokenizer


def load_tokenizer(
    path: str | Path, *, content_tokens: Sequence[str] = (), reasoning: Reasoning = "refuse"
) -> Tokenizer:
    """Read Meta's `tokenizer.model`, a `tokenizer.json`, or a directory with either (`tokenizer.json` first).

    content_tokens: special tokens that texts may spell. reasoning: as for `Tokenizer`. Raises `ValueError` if
    there is no tokenizer, if the file is invalid, or if a content token does not exist or is a control token
    of Llama 3's format.
    """
    path = model_directory(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise ValueError(
                f"tokenizer.path={path}: the directory holds neither tokenizer.json nor tokenizer.model"
            )
        path = found
    plain_file(path, "tokenizer.path:")
    if path.suffix == ".model":
        backend = bpe_from_meta(path)
    else:
        try:
            with _panics_explained():
                backend = Backend.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"tokenizer.path={path} is not a tokenizer.json: {error}") from error
    return Tokenizer(_with_content_tokens(backend, content_tokens, path), reasoning=reasoning)


def _with_content_tokens(backend: Backend, names: Sequence[str], path: Path) -> Backend:
    """The tokenizer in which `names` are no longer special, so that text may contain them."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    stripping = [name for name, token in added.items() if token.lstrip or token.rstrip]
    if stripping:
        raise ValueError(
            f"tokenizer.path={path}: its token {stripping[0]} removes the white space next to it, which the "
            "chat format needs; set lstrip and rstrip to false in tokenizer.json"
        )
    for name in names:
        if name in USED_SPECIAL_TOKENS:
            raise ValueError(
                f"tokenizer.content_tokens: {name} is a control token of Llama 3's format; a text that could "
                "spell it could end its own message. Take it off the list"
            )
        if name not in added:
            own = [token for token in added if token not in USED_SPECIAL_TOKENS]
            raise ValueError(
                f"tokenizer.content_tokens: {path} has no added token {name!r}; it has "
                f"{', '.join(own[:10]) or 'none'}{' and others' if len(own) > 10 else ''}"
            )
    if not any(added[name].special for name in names):
        return backend
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in names
    return Backend.from_str(json.dumps(state))


@contextlib.contextmanager
def _panics_explained() -> Iterator[None]:
    """Turn a panic of the `tokenizers` library into a `ValueError`.

    It panics if the regular expression that splits text backtracks too often. In Python a panic is a
    `BaseException` and not an `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"the tokenizer cannot split a text: {error}; is its tokenizer.json intact?"
        ) from error


def train_small_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids, with Llama 3's special tokens. A digit is a token.

    Raises `ValueError` if `vocab_size` cannot hold 256 bytes and the special tokens.
    """
    return Tokenizer(trained_bpe(texts, vocab_size))
