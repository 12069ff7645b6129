"""The fitted number, and the published steps that were held out of the fit."""

from pathlib import Path

import pytest

from megatron_post.plan.hardware import MATRIX_EFFICIENCY, gpu
from tests.unit.plan.published_steps import fit, fullest_rank, predicted, read_published

FITTED = ("llama3.1-405b bf16 on 512", "llama3.1-405b fp8 on 512")


def test_published_steps(shared_data: Path) -> None:
    """405B is predicted within 1%, and 8B and 70B within 3%."""
    points = read_published(shared_data / "published_step_times.csv")
    chosen = [point for point in points if point.name in FITTED]
    assert len(points) == 6 and len(chosen) == 2
    assert fit(chosen) == pytest.approx(MATRIX_EFFICIENCY, abs=0.002)
    for point in points:
        seconds = predicted(point)
        held_out = "" if point in chosen else "  held out"
        print(f"{point.name}: {point.seconds} s published, {seconds:.2f} predicted, "
              f"{seconds / point.seconds - 1:+.1%}{held_out}")  # fmt: skip
        assert seconds == pytest.approx(point.seconds, rel=0.01 if "405b" in point.name else 0.03)


def test_published_runs_fit(shared_data: Path) -> None:
    """The published runs ran, so the planner must not say that they need more than an H100 has.

    They hold gradients in bf16, and the weights of FP8 runs in FP8.
    """
    for point in read_published(shared_data / "published_step_times.csv"):
        assert fullest_rank(point) < gpu("h100-80gb").memory, point.name


def test_a_microbatch_of_two_sequences_is_a_pack_of_two_segments(tmp_path: Path) -> None:
    """Twice the sequences of a microbatch and half the microbatches are as many tokens and FLOPs."""
    header = "model,precision,gpus,seq_len,layers,tp,pp,cp,dp,vp,mbs,gbs,step_s,source\n"
    rows = "".join(f"llama3.1-8b,bf16,8,8192,24,1,1,1,8,1,{mbs},128,10,made up\n" for mbs in (1, 2))
    (tmp_path / "steps.csv").write_text(header + rows)
    one, two = read_published(tmp_path / "steps.csv")
    assert one.config.model.num_layers == 24
    assert (two.config.data.pack_length, two.config.train.global_batch) == (16384, 64)
    assert predicted(two) == pytest.approx(predicted(one), rel=0.02)
    assert predicted(two) < predicted(one)  # weights and accumulated gradients are read half as often


def test_published_tokens_per_second_per_gpu(shared_data: Path) -> None:
    """405B on 512 H100s reaches 207 in BF16 and 331 in FP8, with 256 x 8,192 tokens in a step."""
    points = {point.name: point for point in read_published(shared_data / "published_step_times.csv")}
    for name, expected in zip(FITTED, (207, 331), strict=True):
        rate = 256 * 8192 / 512 / predicted(points[name])
        assert rate == pytest.approx(expected, rel=0.05)
