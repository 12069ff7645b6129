"""FLOPs worked out by hand."""

import pytest

from megatron_post.config.schema import Model
from megatron_post.train.metrics import model_flops, peak_flops


def test_flops_by_hand() -> None:
    """h 8, 2 heads of 4, 1 group, ffn 16, vocabulary 10, 1 layer. Matrices: q and o 64 + 64, k and v 32 + 32,
    MLP 3 x 128 = 384, output 80: 656. Two segments of 3 and 4 tokens: 7 tokens, squares 25. 6 x 656 x 7 =
    27552, and attention: forward 2 matmuls x 2 FLOPs x 8 x L^2 / 2 = 16 L^2, x 3 with backward = 48 x 25 =
    1200."""
    model = Model(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
        max_position_embeddings=8,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    assert model_flops(model, tokens=7, squared_lengths=25) == 27552 + 1200


def test_405b_is_six_p() -> None:
    """Without attention a token of 405B costs 6 FLOPs a parameter but for the embedding's 128256 x 16384."""
    model = Model(preset="llama3.1_405b")  # type: ignore[call-arg]
    norms = (2 * 126 + 1) * 16384
    expected = 6 * (405_853_388_800 - 128256 * 16384 - norms)
    assert model_flops(model, tokens=1, squared_lengths=0) == expected


def test_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(989e12)
    assert peak_flops("some CPU") is None
