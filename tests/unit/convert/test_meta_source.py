"""Meta's original files, cut over two ranks, give the Hugging Face tensors that they were made from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_post.config.sections import Model
from megatron_post.convert.mapping import META_NAMES
from megatron_post.convert.meta_source import MetaDirectory
from megatron_post.convert.open_model import open_weights_directory
from megatron_post.convert.source import read_rows
from tests.unit.convert.models import shaped_like, to_hf, to_megatron, weights_of

MODEL = shaped_like("8b")
# The dimension along which Meta's tensor-parallel ranks cut a tensor, or None if each rank holds it whole.
_DIMS = {"wo": 1, "w2": 1, "attention_norm": None, "ffn_norm": None, "norm": None}


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Row (head, j, i) of Hugging Face's halves j = 0, 1 is Meta's row (head, i, j)."""
    rows = torch.arange(weight.shape[0]).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return weight[rows]


def _meta(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        _, _, layered = name.partition("model.layers.")
        layer, _, rest = layered.partition(".")
        meta = f"layers.{layer}.{META_NAMES[rest]}" if layered else META_NAMES[name]
        if "q_proj" in name:
            tensor = _interleaved(tensor, model.num_attention_heads)
        elif "k_proj" in name:
            tensor = _interleaved(tensor, model.num_key_value_heads)
        result[meta] = tensor
    return result


def _write(directory: Path, tensors: dict[str, Tensor], *, ranks: int = 2, embedding_dim: int = 0) -> Path:
    directory.mkdir()
    shards: list[dict[str, Any]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        dim = embedding_dim if kind == "tok_embeddings" else _DIMS.get(kind, 0)
        pieces = [tensor] * ranks if dim is None else tensor.chunk(ranks, dim)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{i:02d}.pth")
    params = {
        "dim": MODEL.hidden_size,
        "n_layers": MODEL.num_layers,
        "n_heads": MODEL.num_attention_heads,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "vocab_size": -1,
    }
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def test_permutation_by_hand() -> None:
    """In one head of 4 rows, Meta rotates (0, 1) and (2, 3), and Hugging Face rotates (0, 2) and (1, 3)."""
    # first elements of both pairs, then the second elements
    halves = torch.tensor([[10.0], [11], [20], [21]])
    assert _interleaved(halves, 1).flatten().tolist() == [10, 20, 11, 21]


@pytest.mark.parametrize(("ranks", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_rows_and_conversion_equal_the_source(tmp_path: Path, ranks: int, embedding_dim: int) -> None:
    """Rows equal the source in any cut, and so does a whole conversion."""
    tensors = weights_of(MODEL, dtype=torch.bfloat16)
    if ranks == 2:  # two ranks need an even vocabulary
        tensors = {n: t[:252] if t.shape[0] == 253 else t for n, t in tensors.items()}
    directory = _write(tmp_path / "meta", _meta(tensors, MODEL), ranks=ranks, embedding_dim=embedding_dim)
    source = open_weights_directory(directory)
    assert isinstance(source, MetaDirectory) and source.model.max_position_embeddings == 8192
    for name, tensor in tensors.items():
        for start, end in ((0, tensor.shape[0]), (1, tensor.shape[0] - 2), (5, 6)):
            assert torch.equal(read_rows(source, name, start, end), tensor[start:end]), name
    to_hf(to_megatron(directory, tmp_path / "checkpoints"), tmp_path / "hf")
    from safetensors.torch import load_file

    back = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in back)


def test_scaled_rope_is_llama_31(tmp_path: Path) -> None:
    directory = _write(tmp_path / "meta", _meta(weights_of(MODEL), MODEL), ranks=1)
    params = json.loads((directory / "params.json").read_text()) | {"use_scaled_rope": True}
    (directory / "params.json").write_text(json.dumps(params))
    model = MetaDirectory(directory).model
    assert model.rope_scaling is not None and model.rope_scaling.factor == 8.0
    assert model.max_position_embeddings == 131072


def test_bad_directories_are_refused(tmp_path: Path) -> None:
    """Missing, extra and misshapen tensors, repeated heads, bad parameters and a pickle are refused."""
    tensors = _meta(weights_of(MODEL), MODEL)
    name = "layers.1.attention.wk.weight"

    def refused(changed: dict[str, Tensor], message: str, ranks: int = 1) -> None:
        directory = _write(tmp_path / str(len(list(tmp_path.iterdir()))), changed, ranks=ranks)
        with pytest.raises(ValueError, match=message):
            MetaDirectory(directory)

    refused({n: t for n, t in tensors.items() if n != name}, f"00.pth: .*missing, the first is {name}")
    refused(tensors | {"layers.1.x.weight": torch.ones(2)}, "00.pth: .*the first is layers.1.x.weight")
    refused(tensors | {name: torch.ones(15, 64)}, f"00.pth: {name}: 1 shard.*of .15, 64. do not make .16, 64")
    even = {n: t[:252] if t.shape[0] == 253 else t for n, t in tensors.items()}
    refused(even | {name: torch.ones(32, 64)}, f"{name}: 2 shard.*of .16, 64. do not make .16, 64", ranks=2)
    for values, message in (
        ("[", "not parameters of a Llama: JSONDecodeError"),
        ("null", "not parameters of a Llama: it holds a NoneType"),
        (
            '{"dim": null, "n_layers": 3, "n_heads": 32, "norm_eps": 1e-5}',
            "hidden_size: Input should be a valid",
        ),
        (
            '{"dim": 64, "n_layers": 1e9, "n_heads": 32, "norm_eps": 1e-5}',
            "num_layers: Input should be a valid",
        ),
    ):
        directory = _write(tmp_path / str(len(list(tmp_path.iterdir()))), tensors, ranks=1)
        (directory / "params.json").write_text(values)
        with pytest.raises(ValueError, match=f"{directory}/params.json: {message}"):
            MetaDirectory(directory)
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    directory = _write(tmp_path / "bomb", tensors, ranks=1)
    torch.save(tensors | {name: Bomb()}, directory / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"00.pth: not a file of plain tensors; nothing in it was run"):
        MetaDirectory(directory)
    assert not witness.exists()


def test_another_vocabulary_than_the_tensors_is_named(tmp_path: Path) -> None:
    """A vocab_size of -1, which Meta's files have, is ignored."""
    directory = _write(tmp_path / "meta", _meta(weights_of(MODEL), MODEL), ranks=1)
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"vocab_size": 253}))
    open_weights_directory(directory)
    (directory / "params.json").write_text(json.dumps(params | {"vocab_size": 256}))
    with pytest.raises(
        ValueError, match=r"params.json: vocab_size=256, but tok_embeddings.weight has 253 rows"
    ):
        open_weights_directory(directory)
