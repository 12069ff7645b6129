"""Embeddings of whole dialogs by an encoder of sentence-transformers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_post.curation.duplicates.words import Dialog

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CHUNK = 1024  # windows that are sorted by length and encoded together, on one device
_DEFAULT_WINDOW = 512  # tokens, for an encoder that names no largest input
_ENDLESS = 2**20  # some tokenizers give a huge number for "no limit"


class Encoder:
    """Turns dialogs into unit vectors.

    A dialog is its messages with their roles, one after the other. A dialog that is longer than the encoder's
    input is split into windows of this length. Its vector is the mean of the vectors of its windows, each
    weighted by its tokens.
    """

    def __init__(self, model: str, *, batch_size: int, devices: Sequence[str] = ()) -> None:
        """model: directory or hub name of an encoder. A model of Hugging Face gets mean pooling.

        devices: as torch names them. Several have a process each. None: all visible GPUs, else the CPU.
        Raises `ValueError` if the model cannot be loaded.
        """
        devices = list(devices) or _visible_devices()
        self._batch_size = batch_size
        self._model = _load(model, devices[0])
        self._pool = self._model.start_multi_process_pool(devices) if len(devices) > 1 else None
        window = self._model.get_max_seq_length() or _DEFAULT_WINDOW
        self._window = window if window < _ENDLESS else _DEFAULT_WINDOW

    def close(self) -> None:
        """End the processes of the devices."""
        if self._pool is not None:
            self._model.stop_multi_process_pool(self._pool)

    def encode(self, dialogs: Sequence[Dialog]) -> np.ndarray:
        """Unit vectors, float16 [rows, dimensions].

        Equal calls give equal bytes on one machine, for any number of devices. The last bits depend on what
        else is in a call, because texts of similar lengths are encoded together.
        """
        if not dialogs:
            return np.empty((0, self._model.get_embedding_dimension() or 0), np.float16)
        windows, owners, sizes = self._windows([_as_text(dialog) for dialog in dialogs])
        vectors = self._encode(windows)
        sums = np.zeros((len(dialogs), vectors.shape[1]))
        np.add.at(sums, owners, vectors.astype(np.float64) * np.asarray(sizes)[:, None])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return (sums / np.maximum(norms, 1e-12)).astype(np.float16)

    def _encode(self, windows: list[str]) -> np.ndarray:
        """Encode in chunks whose size does not depend on the devices."""

        def encode(some: list[str]) -> np.ndarray:
            return self._model.encode(
                some,
                batch_size=self._batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
                pool=self._pool,
                chunk_size=_CHUNK,
            )

        if self._pool is not None:
            return encode(windows)
        return np.concatenate([encode(windows[at : at + _CHUNK]) for at in range(0, len(windows), _CHUNK)])

    def _windows(self, texts: Sequence[str]) -> tuple[list[str], list[int], list[int]]:
        """The windows of texts, the text that each belongs to, and the number of its tokens."""
        tokenizer = self._model.tokenizer
        room = self._window - tokenizer.num_special_tokens_to_add()
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )
        windows, owners, sizes = [], [], []
        for owner, (text, offsets) in enumerate(zip(texts, encoded["offset_mapping"], strict=True)):
            for start in range(0, max(len(offsets), 1), room):
                inside = offsets[start : start + room]
                windows.append(text[inside[0][0] : inside[-1][1]] if inside else text)
                owners.append(owner)
                sizes.append(max(len(inside), 1))
        return windows, owners, sizes


def _as_text(dialog: Dialog) -> str:
    return "\n".join(f"{role}: {text}" for role, text in dialog)


def _visible_devices() -> list[str]:
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _load(model: str, device: str) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return SentenceTransformer(model, device=device, trust_remote_code=False)
    except Exception as error:  # the library raises many types, and few of them name the model
        raise ValueError(
            f"encoder {model!r} cannot be loaded on {device}: {error or type(error).__name__}"
        ) from error
