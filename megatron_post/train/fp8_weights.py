"""The weights of a run that keeps them in FP8, `precision.fp8_param_gather`.

The optimizer's fp32 weights are the run's weights, and those of the layers are rounded from them. Checkpoints
and exports take theirs from the optimizer, in bf16. So they are those of a run without FP8 weights, and
either run can resume the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_post.train.shards import optimizer_parts, own_ranges


def has_fp8_weights(chunks: Sequence[Any]) -> bool:
    """Whether layers of these chunks keep weights in FP8."""
    return any(is_float8tensor(parameter) for chunk in chunks for parameter in chunk.parameters())


def finish_gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Make the transposed copies of gathered FP8 weights, which the backward pass multiplies.

    With `optimizer.overlap`, megatron-core makes them only for the gathers that a forward pass waits for.
    """
    weights = [p for chunk in chunks for p in chunk.parameters() if is_float8tensor(p)]
    if weights:
        post_all_gather_processing(weights)


def round_weights(optimizer: MegatronOptimizer) -> None:
    """Write the optimizer's fp32 weights to this rank's slices of the layers' weights, in FP8 and in bf16.

    All ranks must call this function, because the scale of an FP8 weight depends on all its slices.
    """
    for part in optimizer_parts(optimizer):
        part._copy_main_params_to_model_params()


def exact_weights(optimizer: MegatronOptimizer) -> Callable[[Tensor], Tensor]:
    """Gather the fp32 weights behind FP8 weights, in bf16. All ranks must call this function.

    Returns a function from a parameter to its values. Other parameters have their own values.
    """
    values: dict[int, Tensor] = {}
    for part in optimizer_parts(optimizer):
        own = {id(parameter): (start, end) for parameter, start, end in own_ranges(part)}
        for parameter in [p for buffer in part.buffers for p in buffer.params if is_float8tensor(p)]:
            # Each element is in the slice of one rank. The others add -0, which changes neither 0 nor -0.
            whole = torch.full(parameter.shape, -0.0, dtype=parameter.dtype, device=parameter.device)
            if id(parameter) in own:
                start, end = own[id(parameter)]
                exact = part._get_main_param_and_optimizer_states(parameter)["param"]
                whole.view(-1)[start:end].copy_(exact)
            torch.distributed.all_reduce(whole, group=part.data_parallel_group)
            values[id(parameter)] = whole
    return lambda parameter: values[id(parameter)] if id(parameter) in values else parameter.detach()
