"""Verdicts, the search, and the page."""

import dataclasses
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_post.config.load import ConfigError, load_config, to_yaml
from megatron_post.plan.activations import Activations, Segment
from megatron_post.plan.estimate import (
    changed,
    layers_on_gpu,
    make_plan,
    pack_segments,
    single_changes,
    verdict,
)
from megatron_post.plan.hardware import GIB, gpu
from megatron_post.plan.outlook import Outlook
from megatron_post.plan.page import page
from megatron_post.plan.report import plan_json, time_rows, winner_config
from megatron_post.plan.search import closed_form_seconds, search
from tests.tiny import tiny_config
from tests.unit.plan.test_memory import llama_config

H100 = gpu("h100-80gb")
BIG = {"tensor": 8, "sequence": True, "pipeline": 8, "context": 8, "virtual_pipeline": 8,
       "embedding_and_loss_as_layers": True}  # fmt: skip


def test_verdict_has_the_shortfall_and_changes_that_fit() -> None:
    """405B in bf16 without recomputation at 128K does not fit.

    Each change in the verdict changes one setting and fits.
    """
    config = llama_config("llama3.1_405b", BIG, pack_length=131072, train={"steps": 1, "global_batch": 16})
    plan = make_plan(config, gpus=512, gpu=H100)
    assert plan.shortfall > 0
    text = verdict(plan)
    assert f"{plan.shortfall / GIB:.1f} GiB too much" in text and "recompute.mode=full fits" in text
    for change, other in single_changes(plan):
        assert other.shortfall <= 0
        assert len({key.split(".")[0] for key in change}) == 1
        if "--gpus" not in change:
            assert changed(config, change) == other.config
    fixed = changed(config, {"recompute.mode": "full"})
    assert fixed is not None and "fits" in verdict(make_plan(fixed, gpus=512, gpu=H100))


def test_a_switch_that_takes_too_much_is_named() -> None:
    """405B's twelve user buffers of 16,384 tokens are 16,384^2 x 24 bytes: 6 GiB, which this GPU lacks."""
    parallel = BIG | {"tp_comm_overlap": True}
    sections: dict[str, Any] = {
        "recompute": {"mode": "full"},
        "train": {"steps": 1, "global_batch": 16},
    }
    config = llama_config("llama3.1_405b", parallel, pack_length=131072, **sections)
    total = make_plan(config, gpus=512, gpu=H100).fullest.total
    plan = make_plan(config, gpus=512, gpu=dataclasses.replace(H100, memory=total - 1))
    (other,) = [o for change, o in single_changes(plan) if change == {"parallel.tp_comm_overlap": False}]
    assert total - other.fullest.total == 6 * GIB
    assert "  parallel.tp_comm_overlap=false fits" in verdict(plan)


def test_fp8_recipes_of_other_gpus_are_refused() -> None:
    """MXFP8 is refused on H100, in a plan and in a search, as the config's recipe or as another one."""
    config = llama_config("llama3.1_8b", {"tensor": 2}, pack_length=8192)
    mxfp8 = changed(config, {"precision.fp8": "mxfp8"})
    assert mxfp8 is not None and make_plan(mxfp8, gpus=8, gpu=gpu("b200-180gb")).time.seconds
    refused = "precision.fp8=mxfp8 needs GPUs of compute capability 10.0 or higher and below 12.0, and these "
    with pytest.raises(ConfigError, match=refused):
        make_plan(mxfp8, gpus=8, gpu=H100)
    with pytest.raises(ConfigError, match=refused):
        search(mxfp8, gpus=8, gpu=H100)
    with pytest.raises(ConfigError, match=refused):
        search(config, gpus=8, gpu=H100, fp8="mxfp8")


def test_weights_in_fp8_halve_their_gather() -> None:
    """4 ranks gather 2 bytes of each parameter, or 1 byte of those of the layers' matrices."""
    kept, rounded = (
        make_plan(
            llama_config("llama3.1_8b", {}, precision={"fp8": "tensorwise", "fp8_param_gather": key}),
            gpus=4,
            gpu=H100,
        )
        for key in (False, True)
    )
    saved = 32 * 218_103_808 * 3 / 4 / (H100.nvlink * H100.link_efficiency)
    assert kept.time.gather_parameters - rounded.time.gather_parameters == pytest.approx(saved)
    found = search(rounded.config, gpus=4, gpu=H100).plans
    assert {(plan.config.precision.fp8, plan.config.precision.fp8_param_gather) for plan in found} <= {
        ("tensorwise", True),
        (None, False),
    }


def test_fp32_is_planned_with_the_layers_that_run() -> None:
    """Transformer Engine has no attention over packed rows of fp32, so the portable layers are planned.

    A row without a shared prompt stays one segment.
    """
    config = llama_config("llama3.1_8b", {"tensor": 2}, pack_length=8192, precision={"dtype": "fp32"})
    assert layers_on_gpu(config) == "portable"
    assert pack_segments(config, None) == (Segment(8192),)


@pytest.mark.parametrize("fp8", [None, "tensorwise"])
def test_rows_that_share_a_prompt(fp8: str | None) -> None:
    """Rows that share a prompt use Transformer Engine's layers with our attention.

    In one layer without context parallelism, the attention's own output is the only additional memory,
    because the projection keeps it as well. FP8 applies to the matrices.
    """
    precision = {"precision": {"fp8": fp8}}
    shared = llama_config("llama3.1_8b", {"tensor": 2}, stage="reward", **precision)
    separate = llama_config(
        "llama3.1_8b", {"tensor": 2}, stage="reward", reward={"layout": "separate"}, **precision
    )
    assert (layers_on_gpu(shared), layers_on_gpu(separate)) == ("mixed", "transformer_engine")
    ledgers = [Activations(c, layers_on_gpu(c), pack_segments(c, None)) for c in (shared, separate)]
    assert ledgers[0].whole_layer() - ledgers[1].whole_layer() == 2 * 8192 * 4096 // 2
    plans = [make_plan(c, gpus=8, gpu=H100) for c in (shared, separate)]
    assert plans[0].time.passes.matrices == plans[1].time.passes.matrices


def test_any_number_of_chunks_a_rank_is_tried() -> None:
    """70B with 5 chunks of 4 layers on each rank takes 1.8 GiB too much.

    More chunks with fewer layers keep less and fit. One chunk of 20 layers fits too, but is slower. The
    verdict names the fastest.
    """
    parallel = {"tensor": 8, "sequence": True, "pipeline": 4, "virtual_pipeline": 5}
    config = llama_config("llama3.1_70b", parallel, pack_length=16384, train={"steps": 1, "global_batch": 64})
    fits = {next(iter(change)): change for change, _ in single_changes(make_plan(config, gpus=64, gpu=H100))}
    assert fits["parallel.virtual_pipeline"]["parallel.virtual_pipeline"] in (10, 20)


@pytest.mark.parametrize("parallel", [{"pipeline": 4}, BIG, {**BIG, "pipeline": 16, "virtual_pipeline": 2}])
def test_the_fullest_rank_is_the_first_second_or_last(parallel: dict[str, Any]) -> None:
    """Plans that compute only these ranks agree with plans of all ranks."""
    for mode in ("none", "full"):
        config = llama_config(
            "llama3.1_405b",
            {"embedding_and_loss_as_layers": True, **parallel},
            pack_length=16384,
            train={"steps": 1, "global_batch": 2048},
            recompute={"mode": mode},
        )
        plan = make_plan(config, gpus=1024, gpu=H100)
        assert plan.fullest == max(plan.memory, key=lambda rank: rank.total)


def test_nothing_fits() -> None:
    """405B does not fit on one node, because 812 GB of bf16 parameters alone are more than 8 x 80 GB."""
    config = llama_config("llama3.1_405b", {"tensor": 8, "sequence": True})
    assert "no single change fits" in verdict(make_plan(config, gpus=8, gpu=H100))
    with pytest.raises(
        ConfigError, match=r"none of \d+ layouts fits on 8 x h100-80gb. The closest: TP"
    ) as caught:
        search(config, gpus=8, gpu=H100)
    assert "plan search" not in str(caught.value)


def test_impossible_plans_are_refused() -> None:
    config = llama_config("llama3.1_8b", {"tensor": 2})
    with pytest.raises(ConfigError, match="9 ranks are not a multiple"):
        make_plan(config, gpus=9, gpu=H100)
    with pytest.raises(ValueError, match=r"'h100' is not .* \(did you mean 'h100-80gb'\?\): choose one"):
        gpu("h100")
    with pytest.raises(ValueError, match="a segment of 9000 tokens"):
        make_plan(config, gpus=8, gpu=H100, segment_length=9000)


def test_segments() -> None:
    """8,192 tokens in segments of 3,000 leave 2,192.

    An isolated row is a prompt and two responses that see it.
    """
    config = llama_config("llama3.1_8b", {})
    assert [s.length for s in pack_segments(config, 3000)] == [3000, 3000, 2192]
    reward = llama_config("llama3.1_8b", {}, stage="reward")
    assert pack_segments(reward, None) == (Segment(4096), Segment(2048, 4096), Segment(2048, 4096))
    pairs = llama_config("llama3.1_8b", {}, stage="dpo", dpo={"layout": "isolated"})
    assert pack_segments(pairs, None) == pack_segments(reward, None)
    together = llama_config("llama3.1_8b", {}, stage="reward", reward={"layout": "concatenated"})
    assert pack_segments(together, None)[2] == Segment(2048, 6144)
    cut = llama_config("llama3.1_8b", {"context": 8})  # context parallelism cuts every segment into 16 chunks
    assert [s.length for s in pack_segments(cut, 3000)] == [3008, 3008, 2176]


def test_model_flops() -> None:
    """The FLOPs of a step with 4 packs of 4 segments are computed by hand.

    They are 6 t times the matrices (8,030,261,248 less the embedding and 65 norms), and 6 layers x heads x
    head_dim x the squares.
    """
    plan = make_plan(llama_config("llama3.1_8b", {"tensor": 2}), gpus=8, gpu=H100, segment_length=2048)
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert plan.model_flops == pytest.approx(6 * matrices * 4 * 8192 + 6 * 32 * 4096 * 4 * 4 * 2048**2)


def test_untrained_tokens_have_no_logits() -> None:
    """With half of the tokens trained, half of the head's FLOPs go. The memory of the fullest pack stays."""
    config = llama_config("llama3.1_8b", {"tensor": 2})
    every, half = (make_plan(config, gpus=8, gpu=H100, trained_share=share) for share in (1.0, 0.5))
    head = 6 * 128256 * 4096 * 4 * 8192
    assert every.model_flops - half.model_flops == pytest.approx(head / 2)
    assert half.time.passes.matrices < every.time.passes.matrices
    assert half.fullest == every.fullest
    with pytest.raises(ValueError, match=r"--trained-share 0: want above 0 and at most 1"):
        make_plan(config, gpus=8, gpu=H100, trained_share=0)


def test_time_adds_up() -> None:
    plan = make_plan(
        llama_config("llama3.1_70b", {"tensor": 8, "sequence": True, "pipeline": 4}), gpus=32, gpu=H100
    )
    assert sum(time_rows(plan).values()) == pytest.approx(plan.time.seconds)
    assert plan.tokens_per_second_per_gpu * plan.time.seconds * 32 == pytest.approx(4 * 8192)


def test_the_published_layout_fits() -> None:
    """405B at 8,192 ran on 512 H100s without recomputation, in TP 8, PP 8, CP 2, VPP 8 and bf16.

    This trainer keeps gradients in fp32, which take 12 GiB more than bf16 gradients.
    """
    config = llama_config("llama3.1_405b", {**BIG, "context": 2}, train={"steps": 1, "global_batch": 256})
    plan = make_plan(config, gpus=512, gpu=H100)
    assert plan.fullest.total - plan.fullest.kinds["gradients"] / 2 < H100.memory


def test_search_ranks_layouts_that_fit(tmp_path: Path) -> None:
    """The winner's YAML loads as an override of the config, and its plan equals that of the search.

    The closed form that chooses the layouts to simulate is within a tenth of the simulation.
    """
    overlap, train = {"overlap": True}, {"steps": 1, "global_batch": 64}
    config = llama_config("llama3.1_8b", {}, train=train, optimizer=overlap)
    found = search(config, gpus=16, gpu=H100, keep=4)
    assert 0 < found.fitting < found.possible
    seconds = [plan.time.seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    for plan in found.plans:
        assert plan.shortfall <= 0
        assert closed_form_seconds(plan) == pytest.approx(plan.time.seconds, rel=0.1)
    text = to_yaml(config).replace("sources: []", "sources: [{name: a, path: a}]", 1)
    (tmp_path / "config.yaml").write_text(text)
    overrides = ["seed=3", "data.sources.0.path=x"]
    (tmp_path / "winner.yaml").write_text(winner_config(found, str(tmp_path / "config.yaml"), overrides))
    winner = load_config(tmp_path / "winner.yaml")
    assert winner.seed == 3 and winner.data.sources[0].path == "x"
    assert make_plan(winner, gpus=16, gpu=H100).time.seconds == pytest.approx(seconds[0])


def test_changes_that_a_plan_names_can_be_set(tmp_path: Path) -> None:
    """Those of selective recomputation too: other modules than the default have no effect with mode=full."""
    sections = {
        "recompute": {"mode": "selective", "modules": ["core_attn", "mlp"]},
        "train": {"steps": 1, "global_batch": 16},
    }
    config = llama_config("llama3.1_405b", BIG, pack_length=131072, **sections)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    changes = [change for change, _ in single_changes(make_plan(config, gpus=512, gpu=H100))]
    assert any(change.get("recompute.mode") == "full" for change in changes)
    for change in changes:
        overrides = [f"{key}={value}" for key, value in change.items() if key != "--gpus"]
        load_config(tmp_path / "config.yaml", overrides)


@pytest.mark.parametrize("overlap", [False, True])
def test_search_misses_nothing(overlap: bool) -> None:
    """Layouts that the closed form leaves out are not faster, compared with a simulation of all layouts."""
    train = {"steps": 1, "global_batch": 64}
    config = llama_config("llama3.1_8b", {}, train=train, optimizer={"overlap": overlap})
    found = search(config, gpus=64, gpu=H100)
    every = search(config, gpus=64, gpu=H100, keep=found.fitting)
    assert found.plans[0].time.seconds == pytest.approx(every.plans[0].time.seconds, rel=1e-3)


def test_search_tries_fp8_when_asked() -> None:
    config = llama_config("llama3.1_8b", {}, train={"steps": 1, "global_batch": 8})
    plain, both = (search(config, gpus=8, gpu=H100, fp8=fp8) for fp8 in (None, "tensorwise"))
    assert {p.config.precision.fp8 for p in plain.plans} == {None}
    assert both.plans[0].config.precision.fp8 == "tensorwise" and both.possible == 2 * plain.possible
    assert both.plans[0].time.seconds < 0.8 * plain.plans[0].time.seconds
    with pytest.raises(ConfigError, match=r"--fp8: .*\n.*fp8: Input should be"):
        search(config, gpus=8, gpu=H100, fp8="e4m3")


def test_plans_of_fp32_have_a_note_about_time() -> None:
    config = llama_config("llama3.1_8b", {}, precision={"dtype": "fp32"})
    plan = make_plan(config, gpus=1, gpu=H100)
    assert all("fp32 takes several times as long" in text for text in (plan.notes[0], page(plan)))


def test_no_possible_layout_is_an_error() -> None:
    config = llama_config("llama3.1_8b", {})
    with pytest.raises(ConfigError, match=r"train.global_batch=4 .* possible on 7 GPUs"):
        search(config, gpus=7, gpu=H100)


def test_page_is_whole() -> None:
    """The page refers to no other file, draws every rank, kind and chunk, and its SVG is well-formed."""
    config = llama_config("llama3.1_405b", BIG, pack_length=131072, train={"steps": 1, "global_batch": 16})
    plan = make_plan(config, gpus=512, gpu=H100)
    text = page(plan)
    assert not re.search(r"(src|href)=.[^#]|url\([^#]|<script", text)
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    memory, _, timeline = drawings
    # each bar has a title, and so has the drawing
    assert len(memory.findall(".//title")) == 1 + sum(len(rank.kinds) for rank in plan.memory)
    boxes = [path for path in timeline.iter("path") if "#3f7cbf" in path.attrib.get("style", "")]
    assert len(boxes) == 8 * 8
    assert "too much" in text and "405,853,388,800" in text


def test_json_is_complete() -> None:
    plan = make_plan(llama_config("llama3.1_8b", {"tensor": 2}), gpus=8, gpu=H100)
    found = plan_json(Outlook(plan))
    assert found["fits"] is True and found["layout"]["data"] == 4
    assert found["memory"][0]["bytes"] == sum(found["memory"][0]["kinds"].values())


def test_documents_that_see_each_other_are_one_segment() -> None:
    """Their attention costs as much as that of a whole pack, so other segments are refused."""
    sections: Any = {"stage": "pretrain", "data": {"pack_length": 512}, "parallel": {"context": 2}}
    apart = tiny_config(**sections)
    joined = tiny_config(**sections, pretrain={"attention": "pack"})
    assert [s.length for s in pack_segments(apart, 200)] == [200, 200, 112]
    assert pack_segments(joined, None) == pack_segments(joined, 512) == (Segment(512),)
    with pytest.raises(ValueError, match=r"a pack is one segment of data.pack_length=512"):
        pack_segments(joined, 200)
