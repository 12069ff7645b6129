"""Runs one process as one rank of a large layout: its shard of the model, on real packs.

It measures compute only. Process groups are fake: nothing is sent, gathered tensors are copies, and received
tensors are random. There is no pipeline bubble, no optimizer and no gradient reduction. The loss stops at the
log-probabilities or scores. The result is the speed that a GPU reaches on the arithmetic of this rank.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_post.bench.accounting import Counts, count_packs
from megatron_post.bench.environment import environment
from megatron_post.bench.memory import peak_memory
from megatron_post.bench.proxy_figures import Passes, Share, proxy_figures, share_summary
from megatron_post.bench.record import Record
from megatron_post.bench.step_figures import FORMULA, model_settings
from megatron_post.bench.synthetic import write_synthetic
from megatron_post.config.load import parse, raise_for
from megatron_post.config.schema import Config
from megatron_post.data.pack import Pack
from megatron_post.models.build import build_model, uses_portable_attention
from megatron_post.parallel.topology import Topology
from megatron_post.plan.estimate import layout_line
from megatron_post.plan.fake_ranks import fake_rank
from megatron_post.plan.shape import chunks
from megatron_post.stages.base import Stage
from megatron_post.train.inputs import rank_errors
from megatron_post.train.optimizer import wrap_data_parallel
from megatron_post.train.parts import make_stage
from megatron_post.train.step import Microbatch, Stepper

PROXY_WARNING = (
    "PROXY, COMPUTE ONLY: one process runs as one rank, without communication, pipeline bubble, optimizer "
    "and data loading. A step of the whole layout takes longer"
)
_PACKS = 4  # different packs that are used in turn


def measure_proxy(
    config: Config, *, origin: str, rank: int, world_size: int, layers: int | None, steps: int, warmup: int
) -> Record:
    """Run `steps` packs forward and backward, after `warmup` packs.

    layers: of each pipeline rank, instead of the model's. Raises `ValueError` for a rank outside the layout
    and for counts that give no measurement, and `ConfigError` for a layout that cannot run.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"--proxy-rank {rank} is not a rank of --world {world_size}: want 0 to {world_size - 1}"
        )
    if steps < 1 or warmup < 0 or (layers is not None and layers < 1):
        raise ValueError(
            f"--steps {steps} --warmup {warmup} --proxy-layers {layers}: want at least 1, 0 and 1"
        )
    errors = rank_errors(config, world_size=world_size)
    if config.parallel.tp_comm_overlap:
        errors.append(
            "parallel.tp_comm_overlap=true shares buffers with other ranks, and a proxy runs one; set "
            "parallel.tp_comm_overlap=false"
        )
    raise_for(errors)
    cut = {}
    if layers is not None:
        cut = {
            "cut": f"{layers} layers a pipeline rank, in one chunk; the model has {config.model.num_layers}"
        }
        config = with_layers(config, layers)
    gpu = torch.device("cuda", 0) if torch.cuda.is_available() else None
    with fake_rank(config.parallel, rank=rank, world_size=world_size, gpu=gpu) as topology:
        share, taken = _run(config, topology, steps=steps, warmup=warmup)
        memory = peak_memory(topology.device)
    return Record(
        benchmark="proxy",
        subject=f"{config.stage}, {origin}, rank {rank} of {world_size}",
        settings={
            **model_settings(config),
            "layout": layout_line(config, share.data_size),
            **cut,
            "share": share_summary(share),
            "pack": f"{config.data.pack_length:,} random tokens",
            "packs": f"{steps}, after {warmup} to warm up",
        },
        figures=proxy_figures(share, taken, memory=memory),
        environment=environment(),
        notes=(PROXY_WARNING, FORMULA),
    )


def with_layers(config: Config, layers: int) -> Config:
    """The config with `layers` layers on each pipeline rank, in one chunk."""
    values = config.model_dump()
    values["model"]["num_layers"] = layers * config.parallel.pipeline
    values["parallel"] |= {"virtual_pipeline": 1, "embedding_and_loss_as_layers": False}
    return parse(Config, values, origin="--proxy-layers")


def _run(config: Config, topology: Topology, *, steps: int, warmup: int) -> tuple[Share, list[Passes]]:
    models = build_model(config, topology)
    for parameter in (p for model in models for p in model.parameters()):
        torch.nn.init.normal_(parameter, std=config.model.initializer_range)
    share = Share(
        config,
        topology.rank,
        topology.world_size,
        topology.tensor_rank,
        topology.data_size,
        tuple(chunks(config)[topology.pipeline_rank]),
        sum(p.numel() for model in models for p in model.parameters()),
    )
    stage = make_stage(config, topology)
    wrapped = wrap_data_parallel(models, config, topology)
    stepper = Stepper(wrapped, stage, topology, portable=uses_portable_attention(config))
    packs = _packs(config, count=min(_PACKS, steps + warmup))
    batches = [_counted(stepper.prepare(pack), pack, stage, config) for pack in packs]
    taken = []
    for number in range(warmup + steps):
        if number == warmup and topology.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        microbatch, counts = batches[number % len(batches)]
        forward, backward = _pass(wrapped, microbatch, config, topology)
        if number >= warmup:
            taken.append(Passes(forward, backward, counts))
    return share, taken


def _counted(microbatch: Microbatch, pack: Pack, stage: Stage, config: Config) -> tuple[Microbatch, Counts]:
    """A microbatch and its counts. The load is that of this rank, times the context-parallel ranks.

    The ranks have equally many tokens, but not equally many trained ones.
    """
    counts = count_packs([pack], stage, scalar_head=config.traits.scalar_head)
    trained = len(microbatch.trained.tokens) * config.parallel.context
    useful, computed = (replace(load, trained=trained) for load in (counts.useful, counts.computed))
    return microbatch, replace(counts, useful=useful, computed=computed)


def _pass(
    wrapped: Sequence[Any], microbatch: Microbatch, config: Config, topology: Topology
) -> tuple[float, float]:
    """Seconds of a pack forward and backward through every chunk of this rank.

    Each chunk runs backward at once after its forward pass, and gradients accumulate in the buffers. The
    inputs from other chunks and the gradients of the outputs are random. A context-parallel rank's own part
    of a loss over pairs may be zero, and a GPU multiplies zeros faster.
    """
    spent = [0.0, 0.0]
    tokens = len(microbatch.batch.tokens) // (config.parallel.tensor if config.parallel.sequence else 1)
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    for chunk in wrapped:
        model = unwrap_model(chunk)
        if not model.pre_process:
            shape = (tokens, 1, config.model.hidden_size)
            hidden = torch.randn(shape, dtype=dtype, device=topology.device)
            model.set_input_tensor([hidden.requires_grad_()])
        # Without this, DDP would reduce the gradients, and the time of that would be meaningless on fake
        # groups.
        with chunk.no_sync():
            began = _now(topology)
            output = microbatch.through(chunk)
            spent[0] += _now(topology) - began
            gradient = torch.randn_like(output)
            began = _now(topology)
            torch.autograd.backward(output, gradient)
            spent[1] += _now(topology) - began
    return spent[0], spent[1]


def _now(topology: Topology) -> float:
    if topology.device.type == "cuda":
        torch.cuda.synchronize()  # kernels run asynchronously
    return time.perf_counter()


def _packs(config: Config, *, count: int) -> list[Pack]:
    with tempfile.TemporaryDirectory() as directory:
        store = write_synthetic(Path(directory, "store"), config, packs=count)
        return [store.read(i) for i in range(min(count, len(store)))]
