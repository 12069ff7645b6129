"""The one CPU adapter: megatron-core takes CUDA for granted, this maps it to the CPU and gloo.

`cpu_as_cuda()` is entered explicitly at start-up where there is no GPU and undoes everything on exit. With a
GPU present it is never touched. Three things are replaced:

* torch calls that name a CUDA device or pinned memory (a `TorchFunctionMode`),
* `torch.cuda` bookkeeping (streams, events, memory counters) and the generator state that megatron-core's RNG
  tracker keeps,
* megatron-core's fallback Adam. Its distributed optimizer loads checkpoints correctly only for an Adam with
  Apex's interface (`step` in the parameter group), which `ApexStyleAdam` has.

Its advice on the order of CUDA kernels is not shown: there are none.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaCallsToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"`, `pin_memory`, `.cuda()` and `.type()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPES.get(args[0].dtype) or func(*args)
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and any(
            isinstance(a, str | torch.device) and _is_cuda(a) for a in args[1:]
        ):
            args = tuple("cpu" if isinstance(a, str | torch.device) and _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


class _NoStream:
    """A stream or event with nothing to wait for: every CPU operation has ended when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_NoStream":
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class ApexStyleAdam(torch.optim.Optimizer):
    """AdamW with the interface of Apex's FusedAdam: `step` lives in the group, the state is the two moments
    alone."""

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
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            step = float(group["step"])
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(step) for _ in params],
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _rng_state(device: Any = None, **_: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.default_generator.set_state(state)


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def cpu_as_cuda() -> Iterator[None]:
    """Within this context megatron-core runs on the CPU with gloo. Raises `RuntimeError` where a GPU is
    present."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be entered on a machine with a GPU")
    import megatron.core.optimizer as core_optimizer
    import megatron.core.optimizer.distrib_optimizer as core_distributed
    import megatron.core.tensor_parallel.random as core_random

    cuda: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": _nothing,
        "device_count": lambda: 1,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _NoStream,
        "default_stream": _NoStream,
        "stream": _NoStream,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        # seeding through torch.manual_seed would recurse: it seeds CUDA as well
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": _rng_state,
        "set_rng_state": _set_rng_state,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing))
        stack.enter_context(
            mock.patch.multiple(
                core_random, _get_cuda_rng_state=_rng_state, _set_cuda_rng_state=_set_rng_state
            )
        )
        stack.enter_context(
            mock.patch.multiple(core_optimizer, Adam=ApexStyleAdam, USING_PYTORCH_OPTIMIZER=False)
        )
        stack.enter_context(
            mock.patch.multiple(
                core_distributed,
                Adam=ApexStyleAdam,
                HAVE_APEX_OR_TE=True,
                USING_APEX_OPTIMIZER=True,
                create=True,
            )
        )
        stack.enter_context(_CudaCallsToCpu())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
        yield
