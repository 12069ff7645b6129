"""What adapters change in a plan: trained parameters, kept tensors, and FLOPs."""

from megatron_post.config.schema import Config
from megatron_post.models.adapters import LINEARS, ROW_PARALLEL, fused_rows, linear_columns, target_shape
from megatron_post.plan.shape import Chunk, chunk_parameters, head_parameters


def targets_of(config: Config, linear: str) -> list[str]:
    """The targets of a linear layer that have an adapter."""
    if config.adapter is None:
        return []
    return [target for target in LINEARS[linear] if target in config.adapter.targets]


def adapter_parameters(config: Config) -> dict[str, int]:
    """Parameters of a layer's adapters on a tensor-parallel rank, by linear layer."""
    tensor, found = config.parallel.tensor, {}
    for linear, fused in LINEARS.items():
        targets, rank = targets_of(config, linear), 0 if config.adapter is None else config.adapter.rank
        groups, widths = fused_rows(linear, config.model, tensor_size=tensor)
        columns = linear_columns(linear, config.model) // (tensor if fused[0] in ROW_PARALLEL else 1)
        rows = [groups * widths[target] for target in targets]
        magnitudes = sum(rows) * (config.adapter is not None and config.adapter.kind == "dora")
        found[linear] = sum(rank * (columns + count) for count in rows) + magnitudes
    return found


def trained_parameters(config: Config, chunk: Chunk) -> int:
    """Parameters of a chunk on one tensor-parallel rank that have gradients and an optimizer state."""
    if config.adapter is None:
        return chunk_parameters(config, chunk)
    head = head_parameters(config, chunk) if chunk.head and config.traits.scalar_head else 0
    return chunk.layers * sum(adapter_parameters(config).values()) + head


def held_parameters(config: Config, chunk: Chunk) -> int:
    """Parameters of a chunk on one tensor-parallel rank, with its adapters."""
    return chunk_parameters(config, chunk) + chunk.layers * sum(adapter_parameters(config).values())


def input_bytes(config: Config, linear: str, width: int, *, plain: int, element: int) -> int:
    """Bytes of a token's input of a linear layer that are kept for the gradients of weights.

    width: numbers of the input. plain: bytes of each number without an adapter. element: bytes of an
    activation. A frozen matrix keeps no input. Its adapters keep it, or one with dropped numbers for each.
    """
    if config.adapter is None:
        return width * plain
    targets = targets_of(config, linear)
    if config.adapter.dropout:
        return len(targets) * width * (element + 1)  # with the mask
    return width * element * bool(targets)


def update_bytes(config: Config, linear: str, *, tokens: int, element: int) -> int:
    """Bytes that the adapters of a linear layer keep besides its input. tokens: of the layer's output."""
    if config.adapter is None or not (targets := targets_of(config, linear)):
        return 0
    groups, widths = fused_rows(linear, config.model, tensor_size=config.parallel.tensor)
    low = len(targets) * config.adapter.rank
    # DoRA multiplies the whole output, and keeps it for the gradient of the magnitudes.
    output = groups * sum(widths.values()) * (config.adapter.kind == "dora")
    return tokens * element * (low + output)


def adapter_forward(config: Config, tokens: float) -> float:
    """FLOPs of a layer's adapters in the forward pass of one tensor-parallel rank.

    A replicated matrix counts once for all ranks. Without sequence parallelism each rank computes it.
    """
    if config.adapter is None:
        return 0.0
    sides = [sum(target_shape(target, config.model)) for target in config.adapter.targets]
    return 2 * tokens * config.adapter.rank * sum(sides) / config.parallel.tensor


def adapter_traffic(config: Config, *, tokens: int) -> int:
    """Numbers that adapters of a layer read and write forward. Their products are limited by this.

    Of each adapted layer they read the input once. The update of its output is written, joined, read with the
    output and added to it.
    """
    size = 0
    for linear, fused in LINEARS.items():
        if targets := targets_of(config, linear):
            tensor = config.parallel.tensor
            groups, widths = fused_rows(linear, config.model, tensor_size=tensor)
            columns = linear_columns(linear, config.model) // (tensor if fused[0] in ROW_PARALLEL else 1)
            rows = groups * sum(widths.values())
            dora = config.adapter is not None and config.adapter.kind == "dora"
            size += len(targets) * columns + (4 + 2 * (len(fused) > 1) + 2 * dora) * rows
    return tokens * size
