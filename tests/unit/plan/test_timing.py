"""Times of single operations, computed by hand."""

import dataclasses

import pytest

from megatron_post.plan.activations import Segment
from megatron_post.plan.hardware import GPU
from megatron_post.plan.shape import chunk_parameters, chunks, layer_matrices
from megatron_post.plan.step import around_the_pipeline, step_time
from megatron_post.plan.timing import Costs, Software
from tests.unit.plan.test_memory import llama_config

# A GPU with round numbers: 1 PFLOP/s for everything, 1 TB/s of memory, 100 GB/s within a node, 10 GB/s
# between nodes.
ROUND = GPU(
    "round",
    memory=80 * 10**9,
    bf16=1e15,
    fp8=2e15,
    bf16_measured=1e15,
    fp8_measured=2e15,
    memory_bandwidth=1e12,
    nvlink=100e9,
    network=10e9,
    capability=(9, 0),
    transposed_fp8=True,
    source="made up",
    matrix_efficiency=1.0,
    attention_forward=1.0,
    attention_backward=1.0,
    bandwidth_efficiency=1.0,
    link_efficiency=1.0,
    latency=0.0,
)
NOT_CHUNKED = Software(chunked_loss=False, gradient_bytes=4)


def test_matrices_of_a_layer() -> None:
    """A layer of 8B has 218,103,808 parameters less two norms of 4,096.

    A token takes 2 FLOPs for each parameter forward, and twice that backward.
    """
    config = llama_config("llama3.1_8b", {}, optimizer={"gradient_accumulation_fusion": True})
    costs = Costs(config, ROUND, 1, NOT_CHUNKED)
    matrices = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    pack = [Segment(8192)]
    assert costs.layer(pack, "forward").matrices == pytest.approx(2 * 8192 * matrices / 1e15)
    assert costs.layer(pack, "backward").matrices == pytest.approx(4 * 8192 * matrices / 1e15)


def test_an_unfused_gradient_is_written_and_read_again() -> None:
    """Without fusion each of 218,103,808 parameters costs additional memory traffic.

    Its gradient is written and read with 2 bytes each, and added in fp32 with 4 + 4. With fusion the addition
    is hidden behind the arithmetic of 8,192 tokens.
    """
    pack = [Segment(8192)]
    plain, fused = (
        Costs(
            llama_config("llama3.1_8b", {}, optimizer={"gradient_accumulation_fusion": fusion}), ROUND, 1
        ).layer(pack, "backward")
        for fusion in (False, True)
    )
    matrices = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    assert plain.matrices - fused.matrices == pytest.approx(12 * matrices / 1e12)


def test_fp8_halves_the_layers_and_not_the_head() -> None:
    bf16 = Costs(llama_config("llama3.1_8b", {}), ROUND, 1, NOT_CHUNKED)
    fp8 = Costs(llama_config("llama3.1_8b", {}, precision={"fp8": "tensorwise"}), ROUND, 1, NOT_CHUNKED)
    pack = [Segment(8192)]
    a, b = bf16.layer(pack, "forward"), fp8.layer(pack, "forward")
    assert b.matrices == pytest.approx(a.matrices / 2) and b.attention == a.attention
    assert b.elementwise > a.elementwise  # casts
    assert fp8.head("forward") == bf16.head("forward")


def test_casts_to_fp8_are_slower_than_other_memory_traffic() -> None:
    """Forward 8,192 tokens of 8B cast the inputs of four matrices.

    Each of 4,096 and 14,336 values of the output projection and fc2 is read in bf16 and written twice in FP8.
    The norms write 2 x 4,096 values twice.
    """
    pack = [Segment(8192)]
    size = 8192 * ((2 + 2) * (4096 + 14336) + 2 * 2 * 4096)
    config = llama_config("llama3.1_8b", {}, precision={"fp8": "tensorwise"})
    plain = Costs(llama_config("llama3.1_8b", {}), ROUND, 1).layer(pack, "forward").elementwise
    for share in (1.0, 0.5):
        costs = Costs(config, dataclasses.replace(ROUND, cast_efficiency=share), 1)
        assert costs.layer(pack, "forward").elementwise - plain == pytest.approx(size / 1e12 / share)


def test_a_ring_between_nodes_uses_every_card_of_its_members() -> None:
    """A node has eight cards of 10 GB/s and NVLink of 100 GB/s. A ring of 16 ranks moves 15 / 16 of 1 GB."""
    costs = Costs(llama_config("llama3.1_8b", {}), ROUND, 1)
    rates = {1: 80e9, 2: 40e9, 4: 20e9, 8: 10e9, 16: 10e9}
    for spacing, rate in rates.items():
        assert costs.collective(1e9, 16, spacing=spacing) == pytest.approx(15 / 16 * 1e9 / rate)
    assert costs.collective(1e9, 8, spacing=1) == pytest.approx(7 / 8 * 1e9 / 100e9)


def test_fp8_inputs_are_gathered_in_fp8_and_scattered_in_bf16() -> None:
    """Forward a layer gathers the inputs of QKV and fc1 and scatters two outputs, over NVLink."""
    parallel = {"tensor": 8, "sequence": True}
    slow = dataclasses.replace(ROUND, nvlink=1e9)
    one = 8192 * 8192 * 7 / 8 / 1e9  # a byte for each value
    for precision, size in (({}, 2 * 2 + 2 * 2), ({"fp8": "tensorwise"}, 2 * 1 + 2 * 2)):
        costs = Costs(llama_config("llama3.1_70b", parallel, precision=precision), slow, 1)
        assert costs.layer([Segment(8192)], "forward").communication == pytest.approx(size * one)
        assert costs.head("forward").communication == pytest.approx(2 * one)


def test_a_step_on_more_nodes_waits_for_slower_gpus() -> None:
    packs = [(Segment(8192),)] * 4
    config = llama_config("llama3.1_8b", {})
    for data_size, nodes in ((4, 1), (8, 1), (32, 4)):
        step = step_time(Costs(config, dataclasses.replace(ROUND, scale_cost=0.1), data_size), packs)
        alone = step.seconds - step.stragglers
        assert step.stragglers == pytest.approx(alone * 0.1 * {1: 0, 4: 2}[nodes])


def test_attention_costs_what_its_segments_cost() -> None:
    """Causal attention takes 2 L^2 h FLOPs: 8,192 tokens in one segment take 2 x 8192^2 x 4096.

    In four segments they take a quarter of it. A response of 1,024 that sees a prompt of 1,024 costs three
    times as much as a response alone.
    """
    costs = Costs(llama_config("llama3.1_8b", {}), ROUND, 1, NOT_CHUNKED)
    whole = costs.layer([Segment(8192)], "forward").attention
    assert whole == pytest.approx(2 * 8192**2 * 4096 / 1e15)
    assert costs.layer([Segment(2048)] * 4, "forward").attention == pytest.approx(whole / 4)
    alone, behind = Segment(1024), Segment(1024, seen=1024)
    ratio = costs.layer([behind], "forward").attention / costs.layer([alone], "forward").attention
    assert ratio == pytest.approx(3)


def test_collectives_by_size_and_place() -> None:
    """800 bytes over 8 ranks move 700 bytes.

    Eight neighbours are on one node. Eight ranks that are 8 apart are on eight nodes.
    """
    costs = Costs(llama_config("llama3.1_8b", {}), ROUND, 1)
    assert costs.collective(800e9, 8, spacing=1) == pytest.approx(7.0)
    assert costs.collective(800e9, 8, spacing=8) == pytest.approx(70.0)
    assert costs.collective(800e9, 1, spacing=1) == 0


def test_tensor_parallel_layer_waits_four_times_forward() -> None:
    """TP 8 with sequence parallelism has two gathers and two scatters. 7/8 of t h 2 bytes cross a link."""
    config = llama_config("llama3.1_70b", {"tensor": 8, "sequence": True})
    costs = Costs(config, ROUND, 1)
    expected = 4 * (8192 * 8192 * 2 * 7 / 8) / 100e9
    assert costs.layer([Segment(8192)], "forward").communication == pytest.approx(expected)


def test_user_buffers_hide_what_fits_beside_a_multiplication() -> None:
    """At TP 8 a gather is hidden by 7/8 of its multiplication, and a quarter of a scatter is never hidden.

    Links that are a hundred times as fast leave only that quarter of four scatters and two gathers in each
    layer.
    """
    parallel = {"tensor": 8, "sequence": True}
    pack = [Segment(8192)]
    for link in (ROUND.nvlink, 100 * ROUND.nvlink):
        device = dataclasses.replace(ROUND, nvlink=link)
        plain, hidden, again = (
            Costs(llama_config("llama3.1_70b", parallel | {"tp_comm_overlap": on}, recompute=mode), device, 1)
            for on, mode in ((False, {}), (True, {}), (True, {"mode": "full"}))
        )
        whole = 8192 * 8192 * 2 * 7 / 8 / link
        one = {name: 2 * 8192 * count / 1e15 for name, count in layer_matrices(plain.config).items()}
        gathers = [max(0, whole - one[name] * 7 / 8) for name in ("qkv", "fc1")]
        scatters = [whole / 4 + max(0, whole - one[name]) * 3 / 4 for name in ("proj", "fc2")]
        forward = sum(gathers) + sum(scatters)
        assert hidden.layer(pack, "forward").communication == pytest.approx(forward)
        saved = plain.layer(pack, "backward").communication - hidden.layer(pack, "backward").communication
        assert saved == pytest.approx(sum(min(whole, one[name] * 7 / 8) for name in ("proj", "fc2")))
        # With recomputation, the first forward pass gathers without buffers.
        first = again.layer(pack, "forward").communication
        assert first == pytest.approx(2 * whole + sum(scatters))


def test_recomputation_costs_a_forward_pass() -> None:
    pack = [Segment(8192)]
    none = Costs(llama_config("llama3.1_8b", {}), ROUND, 1)
    full = Costs(llama_config("llama3.1_8b", {}, recompute={"mode": "full"}), ROUND, 1)
    difference = full.layer(pack, "backward").total - none.layer(pack, "backward").total
    assert difference == pytest.approx(none.layer(pack, "forward").total)


def test_a_frozen_reference_costs_a_forward_pass_of_the_step() -> None:
    """The pass has the pipeline's bubble: the last rank's passes, and the time to fill the pipeline."""
    packs = [[Segment(8192)]] * 4
    for pipeline in (1, 4):
        parallel = {"pipeline": pipeline}
        stored = step_time(Costs(llama_config("llama3.1_8b", parallel, stage="dpo"), ROUND, 1), packs)
        config = llama_config("llama3.1_8b", parallel, stage="dpo", dpo={"reference": "frozen"})
        frozen = step_time(Costs(config, ROUND, 1), packs)
        assert stored.reference == 0
        forward = [
            sum(e.end - e.start for e in stored.timeline.events if e.rank == r and e.task.kind == "forward")
            for r in range(pipeline)
        ]
        # The last rank has the head and is slowest. A pack arrives after the ranks before it have computed
        # it.
        filling = sum(forward[:-1]) / len(packs) + (pipeline - 1) * Costs(config, ROUND, 1).transfer()
        assert frozen.seconds - stored.seconds == pytest.approx(forward[-1] + filling)


def test_gradients_reduce_beside_the_backward_pass() -> None:
    """Without overlap the step waits for 4 bytes of each parameter, and for 2 bytes to be gathered."""
    plain = llama_config("llama3.1_8b", {})
    overlapped = llama_config("llama3.1_8b", {}, optimizer={"overlap": True})
    packs = [[Segment(8192)]] * 2
    waits = step_time(Costs(plain, ROUND, 2), packs)
    assert waits.reduce_gradients == pytest.approx(4 * 8_030_261_248 / 2 / 100e9)
    assert waits.gather_parameters == pytest.approx(2 * 8_030_261_248 / 2 / 100e9)
    assert step_time(Costs(overlapped, ROUND, 2), packs).reduce_gradients < waits.reduce_gradients


def test_heads_exchanged_for_tokens() -> None:
    """CP 4 on 8B with 8,192 tokens: each rank sends 3/4 of its 2,048 tokens' numbers.

    A token has 4,096 + 2 x 1,024 + 4,096 numbers of 2 bytes, in either pass. They are sent again if the
    attention is recomputed. The computation of a rank does not change.
    """
    pack = [Segment(8192)]
    ring, exchange, again = (
        Costs(
            llama_config("llama3.1_8b", {"context": 4, "cp_comm_type": kind}, recompute=recompute), ROUND, 1
        )
        for kind, recompute in (("p2p", {}), ("a2a", {}), ("a2a", {"mode": "selective"}))
    )
    sent = 2048 * (4096 + 2 * 1024 + 4096) * 2 * 3 / 4 / 100e9
    for kind, times in (("forward", 1), ("backward", 2.5)):
        a, b = ring.layer(pack, kind), exchange.layer(pack, kind)
        assert b.communication - a.communication == pytest.approx(sent)
        assert b.attention == pytest.approx(times * 2 * 8192**2 * 4096 / 4 / 1e15)
    backward = again.layer(pack, "backward").communication
    assert backward - ring.layer(pack, "backward").communication == pytest.approx(2 * sent)


def test_the_first_chunk_is_gathered_beside_the_update_of_the_others() -> None:
    """There are 2 chunks, and no passes that could hide a gather.

    Half of the gather is hidden behind half of the update, which moves 30 / 2 + 4 bytes of each parameter. On
    these links all of that half is hidden. On links with a tenth of the speed, a part is hidden.
    """
    keys = {"overlap": True, "overlap_param_gather_with_optimizer_step": True}
    parallel = {"pipeline": 2, "virtual_pipeline": 2}
    plain, beside = (
        llama_config("llama3.1_8b", parallel, optimizer=optimizer) for optimizer in ({"overlap": True}, keys)
    )
    parts = chunks(plain)
    largest = max(sum(chunk_parameters(plain, c) for c in rank) for rank in parts)
    for link, saved in ((100e9, largest / 100e9 / 2), (10e9, (30 / 2 + 4) * largest / 1e12 / 2)):
        device = dataclasses.replace(ROUND, nvlink=link)
        (_, gather, _), (_, less, _) = (
            around_the_pipeline(Costs(config, device, 2), parts, passes=0.0, microbatches=4)
            for config in (plain, beside)
        )
        assert gather - less == pytest.approx(saved)


def test_uneven_packs_take_longer_than_their_mean() -> None:
    """Two data-parallel packs have one segment and two have 16.

    On a pipeline, the long ones delay the others.
    """
    config = llama_config("llama3.1_8b", {"pipeline": 4})
    costs = Costs(config, dataclasses.replace(ROUND, attention_forward=0.1, attention_backward=0.1), 1)
    long, short = [Segment(8192)], [Segment(512)] * 16
    mixed = step_time(costs, [long, short, long, short]).timeline
    mean = (step_time(costs, [long] * 4).seconds + step_time(costs, [short] * 4).seconds) / 2
    assert mixed.seconds > mean
