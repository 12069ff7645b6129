"""Meta's original files, `consolidated.*.pth` and `params.json`, as a source of Hugging Face tensors."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_post.config.rope import RopeScaling
from megatron_post.config.sections import Model
from megatron_post.convert.configs import check_sizes, written_configs
from megatron_post.convert.contained import contained_file
from megatron_post.convert.mapping import META_NAMES, hf_shapes
from megatron_post.convert.publishing.card import documents_of
from megatron_post.convert.safetensors_file import OpenFiles, Stored, raw_bytes
from megatron_post.convert.source import Kind, check_names
from megatron_post.convert.torch_file import saved_tensors
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.storage.checksums import sha256_of_json
from megatron_post.storage.reading import read_object, reading

PARAMS = "params.json"


class MetaDirectory:
    """A `ModelSource`. Each tensor is cut into as many shards as there were tensor-parallel ranks.

    The pickles are not run and the data is not memory-mapped: see `torch_file`. Raises `ValueError` unless
    names and shapes are exactly those of the Llama that `params.json` describes.
    """

    scalar_head = False
    scores_steps = False

    def __init__(self, directory: str | Path) -> None:
        self.directory, self._open = Path(directory), OpenFiles()
        names = sorted(path.name for path in self.directory.glob("consolidated.*.pth"))
        if not names:
            raise ValueError(f"{self.directory} holds {PARAMS} and no consolidated.*.pth")
        self._files = [contained_file(self.directory, n, named_by=self.directory) for n in names]
        shards = [{n: s.stored for n, s in saved_tensors(path).items()} for path in self._files]
        for shard in shards:
            shard.pop("rope.freqs", None)  # older releases saved it; it follows from the config
        self._params = self._read_params()
        with reading(self.directory / PARAMS, "parameters of a Llama"):
            self.model = _model(self._params, shards, self._files[0])
        expected = hf_shapes(self.model)
        self._meta = {name: _meta_name(name) for name in expected}
        for path, shard in zip(self._files, shards, strict=True):
            check_names(shard, dict.fromkeys(self._meta.values()), origin=path)
        self._pieces = {name: [shard[self._meta[name]] for shard in shards] for name in expected}
        self._dims = {name: self._cut(name, shape) for name, shape in expected.items()}
        self.tensors = {name: Kind(self._pieces[name][0].dtype, shape) for name, shape in expected.items()}

    @property
    def fingerprint(self) -> str:
        stamps = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in self._files]
        return sha256_of_json([stamps, self._params])

    def companions(self) -> dict[str, bytes]:
        """The configs, and the tokenizer's files if `tokenizer.model` is beside the weights."""
        path = self.directory / "tokenizer.model"
        tokenizer = None
        if path.is_file():
            tokenizer = load_tokenizer(contained_file(self.directory, path.name, named_by=self.directory))
        dtype = self.tensors["model.embed_tokens.weight"].dtype
        return written_configs(self.model, tokenizer, dtype=dtype, scalar_head=False)

    def documents(self) -> dict[str, bytes]:
        return documents_of(self.directory, self.companions())

    def read_into(self, name: str, row: int, out: Tensor) -> None:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            self._read(name, row, out)
            return
        # RoPE rotates pairs of rows of a head. Meta pairs the neighbours 2i and 2i + 1, and Hugging Face
        # pairs i and i + d/2. Rows move only within their head, so whole heads are read.
        d = self.model.head_dim
        first, last = row // d * d, -(-(row + out.shape[0]) // d) * d
        heads = torch.empty((last - first, out.shape[1]), dtype=out.dtype)
        self._read(name, first, heads)
        halves = heads.view(-1, d // 2, 2, out.shape[1]).transpose(1, 2).reshape(heads.shape)
        out.copy_(halves[row - first : row - first + out.shape[0]])

    def _read(self, name: str, row: int, out: Tensor) -> None:
        """Fill `out` with rows in Meta's order."""
        dim = self._dims[name]
        if dim == 1:
            begin = 0
            for path, piece in zip(self._files, self._pieces[name], strict=True):
                block = torch.empty((out.shape[0], piece.shape[1]), dtype=out.dtype)
                self._pread(path, piece, row, block)
                out[:, begin : begin + piece.shape[1]] = block
                begin += piece.shape[1]
            return
        pieces = list(zip(self._files, self._pieces[name], strict=True))
        begin = 0
        for path, piece in pieces[:1] if dim is None else pieces:
            start, end = max(row, begin), min(row + out.shape[0], begin + piece.shape[0])
            if start < end:
                self._pread(path, piece, start - begin, out[start - row : end - row])
            begin += piece.shape[0]

    def _pread(self, path: Path, piece: Stored, row: int, out: Tensor) -> None:
        self._open.read(path, piece.offset + row * piece.row_bytes, raw_bytes(out))

    def _cut(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension along which the shards are joined, or None if every shard has the whole tensor.

        Raises `ValueError` if the shards do not make up a tensor of this shape.
        """
        pieces = self._pieces[name]
        if len({piece.dtype for piece in pieces}) == 1 and pieces[0].dtype.is_floating_point:
            if all(piece.shape == shape for piece in pieces) and (len(pieces) == 1 or len(shape) == 1):
                return None
            for dim in range(len(shape)):
                sizes = [piece.shape[dim] for piece in pieces if len(piece.shape) == len(shape)]
                others = {p.shape[:dim] + p.shape[dim + 1 :] for p in pieces}
                if others == {shape[:dim] + shape[dim + 1 :]} and sum(sizes) == shape[dim]:
                    return dim
        found = [piece.shape for piece in pieces]
        raise ValueError(
            f"{self._files[0]}: {self._meta[name]}: {len(found)} shard(s) of {found[0]} do not make {shape}"
        )

    def _read_params(self) -> dict[str, Any]:
        path = contained_file(self.directory, PARAMS, named_by=self.directory)
        params = read_object(path, "parameters of a Llama")
        missing = [name for name in ("dim", "n_layers", "n_heads", "norm_eps") if name not in params]
        if missing:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        return params


def _meta_name(name: str) -> str:
    """Meta's name of a Hugging Face tensor."""
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if name.startswith("model.layers."):
        return f"layers.{layer}.{META_NAMES[rest]}"
    return META_NAMES[name]


def _model(params: dict[str, Any], shards: list[dict[str, Stored]], path: Path) -> Model:
    """The model of `params.json`.

    Vocabulary, feed-forward size and tied embeddings are taken from the tensors, because the file does not
    have them.
    """
    try:
        feed_forward = sum(shard["layers.0.feed_forward.w1.weight"].shape[0] for shard in shards)
        embeddings = [shard["tok_embeddings.weight"].shape for shard in shards]
        hidden = params["dim"]
        vocabulary = sum(shape[0] for shape in embeddings) if embeddings[0][1] == hidden else embeddings[0][0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: tensor {error} is missing") from None
    if params.get("vocab_size", -1) not in (-1, vocabulary):
        raise ValueError(
            f"{path.parent / PARAMS}: vocab_size={params['vocab_size']!r}, but tok_embeddings.weight has "
            f"{vocabulary} rows"
        )
    scaled, tied = params.get("use_scaled_rope", False), "output.weight" not in shards[0]
    if scaled and tied and "rope_scaling_factor" not in params:
        raise ValueError(
            f"{path.parent / PARAMS}: Llama 3.2 scales RoPE by another factor than 3.1, and this file does "
            'not have the factor; add "rope_scaling_factor"'
        )
    model = Model(
        num_layers=params["n_layers"],
        hidden_size=hidden,
        ffn_hidden_size=feed_forward,
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
        vocab_size=vocabulary,
        # params.json does not have it. It is 131,072 since Llama 3.1, which scales RoPE, and 8,192 before.
        max_position_embeddings=131072 if scaled else 8192,
        rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=RopeScaling(factor=params.get("rope_scaling_factor", 8.0)) if scaled else None,
        rms_norm_eps=params["norm_eps"],
        tie_word_embeddings=tied,
    )
    check_sizes(model, origin=path.parent / PARAMS)
    return model
