from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="embeddings need sentence-transformers, an extra")

from megatron_post.curation.duplicates.embedding import Encoder


@pytest.fixture(scope="module")
def small(encoder: Path) -> Encoder:
    return Encoder(str(encoder), batch_size=8, devices=["cpu"])


def asked(prompt: str, answer: str = "I do not know.") -> list[tuple[str, str]]:
    return [("user", prompt), ("assistant", answer)]


def test_vectors_are_unit_vectors_and_equal_in_every_run(small: Encoder) -> None:
    dialogs = [asked("How do I bake bread?"), asked(""), asked("word " * 40)]
    vectors = small.encode(dialogs)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float16
    assert np.allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=1e-3)
    assert small.encode(dialogs).tobytes() == vectors.tobytes()
    assert small.encode([]).shape == (0, 384)


def test_meaning_decides_and_not_words(small: Encoder) -> None:
    bread, loaf, physics = small.encode(
        [
            asked("How do I bake bread?", "Mix flour, water and yeast, and bake the dough."),
            asked("What is the way to make a loaf?", "Combine flour with yeast and water, then bake it."),
            asked("How do I derive the speed of light?", "From the equations of Maxwell."),
        ]
    ).astype(float)
    assert bread @ loaf > 0.7 > bread @ physics + 0.3


def test_a_long_dialog_is_the_weighted_mean_of_its_windows(small: Encoder) -> None:
    """Two windows of 254 tokens and a rest of 100. The words are single tokens of the encoder."""
    words = ["apple"] * 254 + ["river"] * 254 + ["engine"] * 100
    head = "user: "  # two tokens
    texts = [head + " ".join(words[:252]), " ".join(words[252:506]), " ".join(words[506:])]
    windows = small._model.encode(texts, normalize_embeddings=True, batch_size=8)
    mean = np.average(windows.astype(np.float64), axis=0, weights=[254, 254, 102])
    mean /= np.linalg.norm(mean)
    vector = small.encode([[("user", " ".join(words))]])[0].astype(np.float64)
    assert vector @ mean == pytest.approx(1, abs=1e-4)
    assert vector @ windows[0] < 0.99


def test_the_end_of_a_long_dialog_counts(small: Encoder) -> None:
    same = "The river flows past the old town and its mills. " * 40
    first, second = small.encode([asked(same, "It ends in bread. " * 60), asked(same, "Cars race. " * 90)])
    assert first.astype(float) @ second.astype(float) < 0.95


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ValueError, match="encoder '/no/such/model' cannot be loaded on cpu"):
        Encoder("/no/such/model", batch_size=8, devices=["cpu"])


@pytest.mark.slow
def test_several_devices_give_the_same_bytes(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on the CPU stand for two GPUs. A chunk of 8 windows is encoded by one of them."""
    monkeypatch.setattr("megatron_post.curation.duplicates.embedding._CHUNK", 8)
    dialogs = [asked(f"Question number {n}", "word " * n) for n in range(30)]
    one, two = (Encoder(str(encoder), batch_size=4, devices=["cpu"] * n) for n in (1, 2))
    try:
        assert two.encode(dialogs).tobytes() == one.encode(dialogs).tobytes()
    finally:
        two.close()
