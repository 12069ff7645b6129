"""The Adam and the norm of gradients for megatron-core without those of Transformer Engine and Apex.

megatron-core would use torch's AdamW, whose state its distributed optimizer loads wrongly. All parameters of
a resumed run share one step counter, and each of them increments it. A run of 20 parameters that was saved at
step 3 continues as if at step 23. An Adam with Apex's interface keeps the counter in the parameter group, and
is loaded correctly.

Adam's two moments may be bf16, which takes 4 bytes of a parameter instead of 8. This Adam is then used on
every device. Transformer Engine's `FusedAdam` could keep them in bf16 too, but its `step` has fp32 copies of
all moments of a parameter group at once. Its `state_dict`, which each checkpoint calls, copies all moments.

megatron-core's own norm reads the norm of each parameter on the host. On a GPU this means hundreds of waits
in a step.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Moments in bf16 are updated in pieces of this many elements, so their fp32 copies take at most 128 MiB.
PIECE = 2**24


class ApexStyleAdam(torch.optim.Optimizer):
    """AdamW with the interface of Apex's FusedAdam. It uses torch's fused kernel on any device.

    The parameter group has `step`. The state of a parameter has only its two moments.
    """

    moments_dtype: torch.dtype = torch.float32

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. On a GPU this does not synchronize."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    zeros = torch.zeros_like(p, dtype=self.moments_dtype)
                    self.state[p] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            # The kernel only reads the counter. A counter on another device than the parameters would make
            # torch copy it, and wait for the GPU, for each parameter.
            step = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            self._update(group, step, params, [p.grad for p in params], means, squares)

    def _update(
        self,
        group: dict[str, Any],
        step: Tensor,
        params: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
    ) -> None:
        """Update parameters and moments. group: has the settings."""
        torch._fused_adamw_(
            params,
            grads,
            means,
            squares,
            [],
            [step for _ in params],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class Bf16MomentsAdam(ApexStyleAdam):
    """The same AdamW, whose moments are rounded to bf16 after each step.

    The parameters are updated with the moments before they are rounded.
    """

    moments_dtype = torch.bfloat16

    def _update(self, group: dict[str, Any], step: Tensor, *lists: list[Tensor]) -> None:
        for tensors in zip(*lists, strict=True):
            pieces = zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)
            for parameter, gradient, mean, square in pieces:
                exact_mean, exact_square = mean.float(), square.float()
                super()._update(group, step, [parameter], [gradient], [exact_mean], [exact_square])
                mean.copy_(exact_mean)
                square.copy_(exact_square)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, in which torch converts the moments to the dtype of their parameters."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {name: value.to(self.moments_dtype) for name, value in state.items()}


def moments_dtype(optimizer: torch.optim.Optimizer) -> torch.dtype:
    """The dtype in which an Adam keeps its moments. A fused one of another library keeps them in fp32."""
    return optimizer.moments_dtype if isinstance(optimizer, ApexStyleAdam) else torch.float32


@contextlib.contextmanager
def moments_in_bf16() -> Iterator[None]:
    """Within this context megatron-core makes an Adam whose moments are bf16."""
    import megatron.core.optimizer as core_optimizer
    import megatron.core.optimizer.distrib_optimizer as core_distributed

    with (
        mock.patch.object(core_optimizer, "Adam", Bf16MomentsAdam),
        mock.patch.object(core_distributed, "Adam", Bf16MomentsAdam),
    ):
        yield


def gradient_norm(
    chunk_size: int, flag: Tensor, gradients: list[list[Tensor]], *_: Any
) -> tuple[Tensor, None]:
    """The norm fp32 [1] of all gradients together, with the interface of Apex's `multi_tensor_l2norm`."""
    norms = torch.stack(torch._foreach_norm(gradients[0]))
    return torch.linalg.vector_norm(norms).reshape(1), None


@contextlib.contextmanager
def torch_optimizer(*, has_gpu: bool) -> Iterator[None]:
    """Within this context megatron-core uses these two, unless it has fused ones that run here.

    has_gpu: fused Adams run on GPUs only. Apex's Adam also needs CUDA extensions, which Apex can be built
    without.
    """
    import megatron.core.optimizer as core_optimizer
    import megatron.core.optimizer.clip_grads as core_clip
    import megatron.core.optimizer.distrib_optimizer as core_distributed

    has_apex = core_distributed.USING_APEX_OPTIMIZER and importlib.util.find_spec("amp_C") is not None
    if has_gpu and (core_distributed.USING_TE_OPTIMIZER or has_apex):
        yield
        return
    with (
        mock.patch.multiple(core_optimizer, Adam=ApexStyleAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.object(core_clip, "l2_norm_impl", gradient_norm),
        mock.patch.multiple(
            core_distributed, Adam=ApexStyleAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True
        ),
    ):
        yield
