"""The forward pass of a loss, and its forward with backward pass, as two implementations to time."""

import functools
from collections.abc import Callable

import torch
from timing import Implementation
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
FORWARD = ", forward"  # ends the name of an implementation that takes no gradient


def passes(losses: dict[str, Loss], leaf: Tensor) -> list[Implementation]:
    """Two implementations for each loss []. The losses are functions of `leaf`, which requires a gradient."""

    def forward(loss: Loss) -> Tensor:
        with torch.no_grad():
            return loss(leaf)

    def both(loss: Loss) -> Tensor:
        value = loss(leaf)
        torch.autograd.grad(value, leaf)
        return value.detach()

    field = []
    for name, loss in losses.items():
        field.append(Implementation(name + FORWARD, functools.partial(forward, loss)))
        field.append(Implementation(name, functools.partial(both, loss)))
    return field
