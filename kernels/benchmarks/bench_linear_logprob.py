"""Times `linear_logprob`, torch, torch.compile, F.linear_cross_entropy and Liger-Kernel.

    PYTHONPATH=kernels python kernels/benchmarks/bench_linear_logprob.py

Times include forward and backward. Work counts the three matrix multiplications that the task needs, 6 t v h.
Computing the logits again does not count. Memory counts what is allocated beyond hidden and weight. It
includes their gradients, but "into main_grad" has only hidden's gradient.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable

import torch
from megatron_post_kernels.linear_logprob import linear_logprob
from timing import Implementation, arguments, heading, interleaved, matmul_roof, print_table
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of -logp with the softmax in fp32, as trainers without a fused loss compute it."""
    logits = torch.nn.functional.linear(hidden, weight)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def losses(tiny: bool, main_grad: Tensor) -> dict[str, Loss]:
    """Functions that compute the sum of -logp, by name."""

    def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, labels).sum()

    def one_chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, labels, chunk_tokens=max(1, len(labels))).sum()

    def chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, labels, chunk_tokens=2048).sum()

    def accumulating(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, labels, weight_grad=main_grad).sum()

    found: dict[str, Loss] = {
        "megatron-post": fused,
        "megatron-post, one chunk": one_chunk,
        "megatron-post, chunks of 2,048": chunks,
        "megatron-post, into main_grad": accumulating,
        "torch eager": eager,
    }
    if not tiny:
        torch.compiler.reset()  # otherwise a new shape counts towards the limit of recompilations
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    # The options came in a later version than the function. Without them it stores all logits, like "torch
    # eager".
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = functools.partial(
            torch.nn.functional.linear_cross_entropy,
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["Liger-Kernel"] = functools.partial(liger_fused_linear_cross_entropy, reduction="sum")
    return found


def implementation(name: str, loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Implementation:
    def step() -> Tensor:
        value = loss(hidden, weight, labels)
        torch.autograd.grad(value, (hidden, weight), allow_unused=True)
        return value.detach()

    return Implementation(name, step)


def measure(tokens: int, rows: int, width: int, chosen: argparse.Namespace) -> None:
    device = chosen.device
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn(rows, width, dtype=torch.bfloat16, device=device).div_(width**0.5)
    weight.requires_grad_()
    labels = torch.randint(0, rows, (tokens,), device=device)
    main_grad = torch.zeros(rows, width, device=device)
    roof, operations = matmul_roof(min(tokens, 8192), rows, width, device)
    field = [roof]
    for name, loss in losses(chosen.tiny, main_grad).items():
        field.append(implementation(name, loss, hidden, weight, labels))
    timings = interleaved(field, device=device, rounds=chosen.rounds, seconds=chosen.seconds)
    work = {c.name: 6.0 * tokens * rows * width for c in field} | {roof.name: operations}
    title = f"linear_logprob, t {tokens:,}, h {width:,}, v/tp {rows:,}, bf16; forward and backward"
    print_table(title, timings, work=work, unit="TFLOP/s", roof=roof.name)


def main() -> None:
    chosen = arguments(__doc__ or "", tokens=[8192, 32_768, 131_072], hidden=[4096, 16_384])
    print(heading(chosen.device))
    shapes = [(t, v, h) for h in chosen.hidden for v in chosen.rows for t in chosen.tokens]
    for tokens, rows, width in [(64, 256, 32)] if chosen.tiny else shapes:
        measure(tokens, rows, width, chosen)


if __name__ == "__main__":
    main()
