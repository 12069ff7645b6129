"""Models named as on the Hugging Face Hub are read from its cache, and their shape need not be given."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_post.config.load import ConfigError, validate
from megatron_post.config.sections import Model
from megatron_post.convert.hf_reader import open_weights
from megatron_post.convert.open_model import open_model
from megatron_post.data.tokenizer import load_tokenizer
from megatron_post.storage.hub import model_directory

COMMIT, OLDER = "a" * 40, "b" * 40
SAMPLE = Path(__file__).resolve().parents[3] / "configs" / "tiny" / "sample" / "tokenizer"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with `acme/tiny-llama` in the layout of the hub: names link to files by content."""
    from huggingface_hub import constants

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                    max_position_embeddings=128)
    )  # fmt: skip
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    shutil.copytree(SAMPLE, plain, dirs_exist_ok=True)
    root = tmp_path / "hub"
    home = root / "models--acme--tiny-llama"
    for commit, layers in ((COMMIT, 2), (OLDER, 3)):
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "blobs").mkdir(exist_ok=True)
        for file in plain.iterdir():
            content = file.read_bytes()
            if file.name == "config.json":
                content = content.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": %d' % layers)
            blob = home / "blobs" / f"{layers}-{file.name}"
            blob.write_bytes(content)
            (home / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    (home / "refs" / "older").write_text(OLDER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return home


def test_shape_weights_and_tokenizer_of_a_hub_name(cache: Path) -> None:
    model = Model(init_from="acme/tiny-llama")  # type: ignore[call-arg]  # the rest comes from config.json
    assert (model.num_layers, model.hidden_size, model.tie_word_embeddings) == (2, 32, True)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = LlamaForCausalLM.from_pretrained(cache / "snapshots" / COMMIT).state_dict()[name]
    assert torch.equal(open_weights(model, seed=0).read(name, None, 0, 0), expected)
    assert open_model(Path("acme/tiny-llama")).model == model.model_copy(update={"init_from": None})
    assert load_tokenizer("acme/tiny-llama").fingerprint == load_tokenizer(SAMPLE).fingerprint


def test_a_revision(cache: Path) -> None:
    """The older revision has a config of three layers, so the weights are not its own."""
    assert Model(init_from="acme/tiny-llama@older").num_layers == 3  # type: ignore[call-arg]
    assert model_directory(f"acme/tiny-llama@{OLDER}") == cache / "snapshots" / OLDER
    with pytest.raises(ValueError, match="acme/tiny-llama@gone is neither a directory here nor in the hub"):
        model_directory("acme/tiny-llama@gone")


def test_a_given_shape_is_compared_with_the_weights(cache: Path) -> None:
    shape = Model(init_from="acme/tiny-llama").model_dump()  # type: ignore[call-arg]
    other = Model(**shape | {"rope_theta": 7.0})
    with pytest.raises(ValueError, match=r"acme/tiny-llama is another model:\n  model.rope_theta: 7.0"):
        open_weights(other, seed=0)


def test_directories_come_first(cache: Path, tmp_path: Path) -> None:
    """A path that is there is never looked up, and neither is one whose first part is a directory."""
    (tmp_path / "acme" / "tiny-llama").mkdir(parents=True)
    assert model_directory("acme/tiny-llama") == Path("acme/tiny-llama")
    assert model_directory("acme/other") == Path("acme/other")
    for path in ("/acme/tiny-llama", "./acme/tiny-llama", "a/b/c", "tiny", "../x", "a/b@"):
        assert model_directory(path) == Path(path)


def test_what_the_cache_lacks_is_an_error_with_a_remedy(cache: Path) -> None:
    values = {
        "run_dir": "r",
        "model": {"init_from": "acme/missing"},
        "tokenizer": {"path": "t"},
        "data": {"store": "s", "pack_length": 64},
        "train": {"steps": 1, "global_batch": 1},
    }
    with pytest.raises(ConfigError, match=r"acme/missing is neither a directory.*hf download acme/missing"):
        validate(values, origin="run.yaml")
