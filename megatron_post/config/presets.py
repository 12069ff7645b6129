"""Model shapes by name. They are the published `config.json` of each Llama 3 size, and a tiny one for CPUs.

The sources are "The Llama 3 Herd of Models", table 3, and the published configurations. 405B has 8 key-value
heads, which the first release of its weights repeated to 16.
"""

from typing import Any

_LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA3_0 = {**_LLAMA3, "max_position_embeddings": 8192}
_LLAMA3_1: dict[str, Any] = {
    **_LLAMA3,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


# 3.2 was scaled further, and its small models share the embedding with the output layer.
_LLAMA3_2 = {
    **_LLAMA3_1,
    "tie_word_embeddings": True,
    "rope_scaling": {**_LLAMA3_1["rope_scaling"], "factor": 32.0},
}


def _shape(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_shape(4, 128, 352, 8, 4),
        "vocab_size": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    "llama3_8b": {**_LLAMA3_0, **_shape(32, 4096, 14336, 32, 8)},
    "llama3_70b": {**_LLAMA3_0, **_shape(80, 8192, 28672, 64, 8)},
    "llama3.1_8b": {**_LLAMA3_1, **_shape(32, 4096, 14336, 32, 8)},
    "llama3.1_70b": {**_LLAMA3_1, **_shape(80, 8192, 28672, 64, 8)},
    "llama3.2_1b": {**_LLAMA3_2, **_shape(16, 2048, 8192, 32, 8)},
    "llama3.2_3b": {**_LLAMA3_2, **_shape(28, 3072, 8192, 24, 8)},
    "llama3.3_70b": {**_LLAMA3_1, **_shape(80, 8192, 28672, 64, 8)},
    "llama3.1_405b": {**_LLAMA3_1, **_shape(126, 16384, 53248, 128, 8)},
}
