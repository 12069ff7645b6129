"""Llama 3.1's frequencies are compared with those of `transformers`."""

import pytest
import torch

from megatron_post.config.sections import Model
from megatron_post.convert.hf_config import differences, from_hf_config, to_hf_config
from megatron_post.models.packing import transformer_engine_segments
from megatron_post.models.rotary import PositionRotary, inverse_frequencies

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("preset", ["llama3_8b", "llama3.1_405b", "tiny"])
def test_frequencies_equal_transformers(preset: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = Model(preset=preset)  # type: ignore[call-arg]
    values = to_hf_config(model, dtype="float32", bos_id=1, eos_ids=[2], pad_id=None)
    expected = LlamaRotaryEmbedding(transformers.LlamaConfig(**values)).inv_freq
    torch.testing.assert_close(inverse_frequencies(model), expected, rtol=1e-6, atol=0)


def test_lengths_for_transformer_engine_are_powers_of_two() -> None:
    """megatron-core caches the angles of 32 lengths, so packs must ask for few different lengths."""
    rotary = PositionRotary(Model(preset="tiny"), device=torch.device("cpu"), context_group=None)  # type: ignore[call-arg]
    for longest, asked in ((1, 1), (1000, 1024), (1024, 1024), (1025, 2048)):
        packed = transformer_engine_segments(
            torch.tensor([0, 1, longest + 1]), context_size=1, device=torch.device("cpu")
        )
        assert packed.max_seqlen_q == longest
        assert rotary.get_rotary_seq_len(None, None, None, None, packed) == asked


def test_scaling_by_hand() -> None:
    """head_dim 4 and theta 100 give the frequencies 1 and 0.1, with wavelengths 6.28 and 62.8.

    The original context is 64, low is 1 and high is 4. The wavelength 6.28 is below 64/4 and is kept. The
    wavelength 62.8 lies between 16 and 64 and has smooth = (64/62.83 - 1) / 3 = 0.00620. Its frequency
    becomes 0.1 x ((1 - 0.00620) / 8 + 0.00620) = 0.0130422.
    """
    shape = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = Model(**shape, vocab_size=8, max_position_embeddings=512, rope_theta=100.0, rms_norm_eps=1e-5,
                  tie_word_embeddings=False, rope_scaling=scaling)  # fmt: skip
    torch.testing.assert_close(inverse_frequencies(model), torch.tensor([1.0, 0.0130422]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("preset", ["llama3_8b", "llama3.1_70b", "tiny"])
def test_hf_config_round_trip(preset: str, tmp_path) -> None:
    model = Model(preset=preset)  # type: ignore[call-arg]
    values = to_hf_config(model, dtype="bfloat16", bos_id=1, eos_ids=[2], pad_id=None)
    transformers.LlamaConfig(**values).save_pretrained(tmp_path)
    assert differences(model, from_hf_config(tmp_path)) == []
