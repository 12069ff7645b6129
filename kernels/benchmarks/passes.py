"""The forward pass of a loss, and forward with backward, as contenders."""

import functools
from collections.abc import Callable

import torch
from timing import Contender
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
FORWARD = ", forward"  # ends the name of a contender that takes no gradient


def passes(losses: dict[str, Loss], leaf: Tensor) -> list[Contender]:
    """Two contenders for each loss [] of `leaf`, which requires a gradient."""

    def forward(loss: Loss) -> Tensor:
        with torch.no_grad():
            return loss(leaf)

    def both(loss: Loss) -> Tensor:
        value = loss(leaf)
        torch.autograd.grad(value, leaf)
        return value.detach()

    field = []
    for name, loss in losses.items():
        field.append(Contender(name + FORWARD, functools.partial(forward, loss)))
        field.append(Contender(name, functools.partial(both, loss)))
    return field
