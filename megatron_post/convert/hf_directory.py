"""A Hugging Face directory of safetensors as a source of tensors. Nothing in the directory is trusted."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.convert.configs import read_model
from megatron_post.convert.contained import companion_files, contained_file
from megatron_post.convert.mapping import SCORE, SCORE_BIAS, hf_shapes
from megatron_post.convert.publishing.card import documents_of
from megatron_post.convert.safetensors_file import OpenFiles, Stored, raw_bytes, read_header
from megatron_post.convert.source import Kind, check_names, row_blocks
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.hub import model_directory
from megatron_post.storage.reading import read_object, reading

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROTARY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


class HuggingFaceDirectory:
    """A `ModelSource` of `config.json` and safetensors files, with or without an index.

    Raises `ValueError` with the file and the tensor unless names and shapes are exactly those of the Llama
    that the config describes. Two kinds of additional tensors are accepted and left out. The first kind is
    rotary buffers, which earlier releases of `transformers` saved and which follow from the config. The
    second kind is an output layer that equals the embedding bit for bit, if the config ties the two.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory, self._files = model_directory(directory), OpenFiles()
        self.model = read_model(self.directory)
        found = self._locate()
        self._places = {name: found[name] for name in needed_names(found, self.model)}
        self.scalar_head = SCORE[0] in self._places
        self.scores_steps = SCORE_BIAS[0] in self._places
        if EMBEDDING.removeprefix("model.") in self._places and EMBEDDING not in self._places:
            raise ValueError(
                f"{self.directory}: names of tensors lack the prefix `model.`, as in a LlamaModel, which has "
                "no output layer; save a LlamaForCausalLM"
            )
        expected = hf_shapes(self.model, scalar_head=self.scalar_head, scores_steps=self.scores_steps)
        check_names(self._places, expected, origin=self.directory)
        for name, shape in expected.items():
            path, stored = self._places[name]
            if stored.shape != shape:
                raise ValueError(f"{path}: {name} has shape {stored.shape}, expected {shape}")
            if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
                raise ValueError(f"{path}: {name} is {stored.dtype}: quantized weights cannot be used")
        if HEAD in found and HEAD not in self._places:
            self._check_tied(*found[HEAD])
        self.tensors = {
            name: Kind(self._places[name][1].dtype, self._places[name][1].shape) for name in expected
        }

    @property
    def fingerprint(self) -> str:
        """A hash of names, sizes, times and layout of the files. Hashing the content would take too long."""
        files = {path for path, _ in self._places.values()}
        stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(files)]
        places = [[n, p.name, str(s.dtype), s.shape, s.offset] for n, (p, s) in sorted(self._places.items())]
        return sha256_of_json([stamps, places])

    def companions(self) -> dict[str, bytes]:
        return companion_files(self.directory)

    def documents(self) -> dict[str, bytes]:
        return documents_of(self.directory, self.companions())

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        path, stored = self._places[name]
        self._files.read(path, stored.offset + row * stored.row_bytes, raw_bytes(out))

    def read(self, name: str, dim: int | None, start: int, end: int) -> Tensor:
        """Rows or columns [start, end) along `dim`, or the whole tensor if dim is None."""
        path, stored = self._places[name]
        if dim != 1:
            first, last = (0, stored.shape[0]) if dim is None else (start, end)
            out = torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
            self.read_into(name, first, out)
            return out
        out = torch.empty((stored.shape[0], end - start), dtype=stored.dtype)
        target, width = raw_bytes(out), (end - start) * stored.dtype.itemsize
        for row in range(stored.shape[0]):
            place = stored.offset + row * stored.row_bytes + start * stored.dtype.itemsize
            self._files.read(path, place, target[row * width : (row + 1) * width])
        return out

    def _check_tied(self, path: Path, head: Stored) -> None:
        """Raises `ValueError` if the output layer does not equal the embedding bit for bit."""
        embedding_path, embedding = self._places[EMBEDDING]
        found = None
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            found = f"{head.dtype} {head.shape} and not {embedding.dtype} {embedding.shape}"
        for start, end in row_blocks(embedding) if found is None else ():
            first, second = (
                self._bytes(path, head, start, end),
                self._bytes(embedding_path, embedding, start, end),
            )
            if not torch.equal(first, second):
                found = f"other values in rows {start} to {end - 1}"
                break
        if found is not None:
            raise ValueError(
                f"{path}: {HEAD} is not {EMBEDDING} ({found}), but config.json ties them with "
                "tie_word_embeddings=true; set it to false if the output layer is the model's own, or remove "
                f"{HEAD}"
            )

    def _bytes(self, path: Path, stored: Stored, start: int, end: int) -> Tensor:
        out = torch.empty((end - start) * stored.row_bytes, dtype=torch.uint8)
        self._files.read(path, stored.offset + start * stored.row_bytes, raw_bytes(out))
        return out

    def _locate(self) -> dict[str, tuple[Path, Stored]]:
        index = self.directory / INDEX
        weight_map = read_index(self.directory)
        if weight_map is None:
            path = contained_file(self.directory, SINGLE, named_by=self.directory)
            return {name: (path, stored) for name, stored in read_header(path).items()}
        places: dict[str, tuple[Path, Stored]] = {}
        names = sorted(set(weight_map.values()))
        paths = {name: contained_file(self.directory, name, named_by=index) for name in names}
        if os.path.lexists(self.directory / SINGLE) and SINGLE not in names:
            raise ValueError(f"{self.directory} holds both {INDEX} and {SINGLE}; remove one of them")
        for file_name, path in paths.items():
            header = read_header(path)
            named = {name for name, file in weight_map.items() if file == file_name}
            if missing := sorted(named - set(header)):
                raise ValueError(f"{path}: tensor {missing[0]} is in the index and not in the file")
            if extra := sorted(set(header) - named):
                raise ValueError(f"{path}: tensor {extra[0]} is in the file and not in the index")
            places |= {name: (path, stored) for name, stored in header.items()}
        return places


def needed_names(found: Iterable[str], model: Model) -> list[str]:
    """The names of the tensors that must be read.

    Rotary buffers follow from the config. The output layer is left out if the config ties it to the
    embedding.
    """
    tied = (HEAD,) if model.tie_word_embeddings else ()
    return [name for name in found if name not in tied and not _ROTARY.fullmatch(name)]


def read_index(directory: Path) -> dict[str, str] | None:
    """The file name of each tensor, or None if the directory has one file without an index.

    Raises `ValueError` if the directory has neither, and for a malformed index.
    """
    index = directory / INDEX
    if os.path.lexists(index):
        path = contained_file(directory, INDEX, named_by=directory)
        with reading(path, "an index with a weight_map"):
            weight_map = read_object(path, "an index with a weight_map")["weight_map"]
            if not all(
                isinstance(name, str) and name.isprintable() for pair in weight_map.items() for name in pair
            ):
                raise ValueError("names are printable strings")
        return dict(weight_map)
    if os.path.lexists(directory / SINGLE):
        return None
    if list(directory.glob("*.bin")):
        raise ValueError(
            f"{directory} holds pickled .bin weights, which can run code when they are read; if you trust "
            "them, load them with transformers and save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{directory} holds neither {SINGLE} nor {INDEX}")
