"""The Adam and the norm of gradients for megatron-core without those of Transformer Engine and Apex.

megatron-core would use torch's AdamW, whose state its distributed optimizer loads wrongly. All parameters of
a resumed run share one step counter, and each of them increments it. A run of 20 parameters that was saved at
step 3 continues as if at step 23. An Adam with Apex's interface keeps the counter in the parameter group, and
is loaded correctly.

Its own norm reads the norm of each parameter on the host, which on a GPU means hundreds of waits in a step.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class ApexStyleAdam(torch.optim.Optimizer):
    """AdamW with the interface of Apex's FusedAdam. It uses torch's fused kernel on any device.

    The parameter group has `step`. The state of a parameter has only its two moments.
    """

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
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # The kernel only reads the counter. A counter on another device than the parameters would make
            # torch copy it, and wait for the GPU, for each parameter.
            step = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
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
