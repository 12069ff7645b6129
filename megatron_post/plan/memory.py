"""Memory of every pipeline rank by kind, at the peak of a training step.

Some memory is static: parameters, gradients (fp32, in DDP's buffers), the optimizer's shard over data x
context ranks, FP8 copies of the matrices, and a frozen reference. The optimizer's shard has Adam's two
moments in fp32 or bf16 and, if the parameters are bf16, an fp32 master. The passes of the schedule hold
further memory. It is the largest sum over the order in which the rank runs its passes, and not an estimate
from the number of microbatches.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_post.config.schema import Config
from megatron_post.plan.activations import Activations, Layers, Segment
from megatron_post.plan.adapters import held_parameters, trained_parameters
from megatron_post.plan.schedule import Pass, rank_order
from megatron_post.plan.shape import Chunk, chunks, layer_matrices
from megatron_post.plan.sizes import FP32


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a pipeline rank by kind. All its tensor-, context- and data-parallel ranks hold the same."""

    pipeline_rank: int
    parameters: int  # number of parameters
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def memory(
    config: Config,
    *,
    data_size: int,
    layers: Layers = "transformer_engine",
    segments: Sequence[Segment] = (),
    fp8_copies: int = 2,
    reserve: int = 0,
    extremes: bool = False,
) -> list[RankMemory]:
    """Peak memory of each pipeline rank.

    data_size: data-parallel ranks. segments: of a pack. By default one segment fills it. fp8_copies: bytes of
    cached FP8 weights for each parameter. It is 2 if a transposed copy is needed (Hopper), and otherwise 1.
    reserve: bytes of the runtime (CUDA context, NCCL, fragmentation), which are a kind of their own.
    extremes: compute only the first, second and last rank, one of which is the fullest. The ranks between
    them have the same layers as the second and hold fewer passes.
    """
    ledger = Activations(config, layers, tuple(segments) or (Segment(config.data.pack_length),))
    microbatches = config.train.global_batch // data_size
    p = config.parallel
    result = []
    # The warm-up and one group of microbatches through all chunks are enough. After that the schedule
    # repeats.
    enough = min(microbatches, 3 * p.pipeline)
    for rank, parts in enumerate(chunks(config)):
        if extremes and 1 < rank < p.pipeline - 1:
            continue
        order = rank_order(rank, pipeline=p.pipeline, virtual=p.virtual_pipeline, microbatches=enough)
        kinds = _static_kinds(config, parts, data_size=data_size, fp8_copies=fp8_copies)
        kinds |= _peak_kinds(ledger, parts, order)
        kinds["batches"] = microbatches * ledger.batch()
        kinds["communication"] = ledger.gather_buffer() + _receive_buffers(config, rank)
        kinds["user buffers"] = user_buffers(config)
        kinds["runtime"] = reserve
        count = sum(held_parameters(config, chunk) for chunk in parts)
        result.append(RankMemory(rank, count, {name: size for name, size in kinds.items() if size}))
    return result


def _static_kinds(
    config: Config, parts: Sequence[Chunk], *, data_size: int, fp8_copies: int
) -> dict[str, int]:
    """Memory that is held through the whole step, by kind."""
    count = sum(held_parameters(config, chunk) for chunk in parts)
    trained = sum(trained_parameters(config, chunk) for chunk in parts)
    element = 2 if config.precision.dtype == "bf16" else FP32
    moment = 2 if config.optimizer.moments == "bf16" else FP32
    state = 2 * moment + (FP32 if element == 2 else 0)
    kinds = {
        "parameters": count * element,
        "gradients": trained * FP32,
        "optimizer": -(-trained // (data_size * config.parallel.context)) * state,
    }
    matrices = sum(chunk.layers for chunk in parts) * sum(layer_matrices(config).values())
    if config.precision.fp8_param_gather:
        # A matrix is one of its FP8 copies, and has no bf16 values besides.
        kinds["parameters"] -= matrices * (element - 1)
        kinds["fp8 weights"] = matrices * (fp8_copies - 1)
    elif config.precision.fp8:
        kinds["fp8 weights"] = matrices * fp8_copies
    if config.optimizer.gradient_accumulation_fusion:
        # Transformer Engine returns an unused tensor to autograd, and keeps one for every shape of a weight.
        kinds["unused gradients"] = sum(layer_matrices(config).values()) * element
    if config.copies_reference:
        kinds["reference"] = count * element + (matrices * fp8_copies if config.precision.fp8 else 0)
    return kinds


def held(ledger: Activations, chunk: Chunk) -> Counter[str]:
    """Bytes that one forward pass of a chunk keeps until its backward pass, by module."""
    kept: Counter[str] = Counter()
    if ledger.config.recompute.mode == "full":
        kept["layer inputs"] = chunk.layers * ledger.layer() + ledger.angles() * bool(chunk.layers)
    else:
        kept["norms"] = chunk.layers * ledger.norms()
        if chunk.embedding and chunk.layers:
            kept["norms"] -= ledger.first_input()
        kept["attention"] = chunk.layers * ledger.attention()
        kept["mlp"] = chunk.layers * ledger.mlp()
    kept["pipeline tensors"] = ledger.boundary(first=chunk.embedding, last=chunk.head)
    if chunk.embedding:
        kept["embedding"] = ledger.embedding()
    if chunk.head:
        kept.update(ledger.loss())
    return kept


def working(ledger: Activations, chunk: Chunk, kind: str) -> int:
    """Bytes that a pass needs while it runs, beyond what it keeps."""
    if kind == "forward":
        return 0
    layer = ledger.layer_backward() if chunk.layers else 0
    if not chunk.head:
        return layer
    # The tensors of the head are free again when the backward pass reaches the layers.
    return max(ledger.loss_backward(), layer - sum(ledger.loss().values()))


def _peak_kinds(ledger: Activations, parts: Sequence[Chunk], order: Sequence[Pass]) -> dict[str, int]:
    """Activations by module and working memory, at the moment when their sum is largest."""
    kept = [held(ledger, chunk) for chunk in parts]
    weights = [sum(item.values()) for item in kept]
    extras = {
        (kind, number): working(ledger, chunk, kind)
        for number, chunk in enumerate(parts)
        for kind in ("forward", "backward")
    }
    in_flight = [0] * len(parts)
    now = most = extra_then = 0
    then = tuple(in_flight)
    for task in order:
        if task.kind == "forward":
            in_flight[task.chunk] += 1
            now += weights[task.chunk]
        extra = extras[task.kind, task.chunk]
        if now + extra > most:
            most, extra_then, then = now + extra, extra, tuple(in_flight)
        if task.kind == "backward":
            in_flight[task.chunk] -= 1
            now -= weights[task.chunk]
    total: Counter[str] = Counter()
    for passes, modules in zip(then, kept, strict=True):
        for name, size in modules.items():
            total[name] += passes * size
    return {**total, "working": extra_then}


def user_buffers(config: Config) -> int:
    """Bytes of the buffers of `tp_comm_overlap`.

    There are twelve, one for each multiplication with its communication, with a rank's tokens. With FP8 the
    eight gathered buffers have one byte per number (Transformer Engine's `initialize_ub`).
    """
    p = config.parallel
    gathered = 1 if config.precision.fp8 else 2
    one = config.data.pack_length // p.context * config.model.hidden_size
    return one * (8 * gathered + 4 * 2) if p.tp_comm_overlap else 0


def _receive_buffers(config: Config, rank: int) -> int:
    """Bytes of tensors in transfer between pipeline ranks: an input and a gradient.

    The interleaved schedule receives the next ones while it computes.
    """
    p = config.parallel
    shard = config.data.pack_length // p.context // (p.tensor if p.sequence else 1)
    one = shard * config.model.hidden_size * (2 if config.precision.dtype == "bf16" else FP32)
    if p.virtual_pipeline > 1:
        return 4 * one
    return one * ((rank > 0) + (rank < p.pipeline - 1))
