"""Times `logprob`, torch, torch.compile and Liger-Kernel on given bf16 logits.

    PYTHONPATH=kernels python kernels/benchmarks/bench_logprob.py

The forward pass reads the logits once. Forward and backward together read them twice and write them once.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable

import torch
from megatron_post_kernels.logprob import logprob
from timing import Implementation, arguments, copy_roof, heading, interleaved, print_table
from torch import Tensor

_FORWARD = ", forward"
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """-logp [t] in fp32, as trainers without a fused loss compute it."""
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def losses(tiny: bool) -> dict[str, Loss]:
    """Functions that compute -logp [t], by name."""
    found: dict[str, Loss] = {
        "megatron-post": lambda logits, labels: -logprob(logits, labels),
        "torch eager": eager,
    }
    if not tiny:
        torch.compiler.reset()  # otherwise a new shape counts towards the limit of recompilations
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["Liger-Kernel"] = functools.partial(liger_cross_entropy, reduction="none")
    return found


def implementations(loss: Loss, name: str, logits: Tensor, labels: Tensor) -> list[Implementation]:
    """The forward pass, and forward with backward.

    Losses may overwrite the logits, so each step refills them.
    """
    upstream = torch.ones(len(labels), device=labels.device)
    leaf = logits.detach().requires_grad_()

    def refresh() -> None:
        logits.normal_()

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(logits, labels).sum()

    def both() -> Tensor:
        values = loss(leaf.view_as(leaf), labels)
        torch.autograd.grad(values, leaf, upstream.to(values.dtype))
        return values.sum()

    return [Implementation(name + _FORWARD, forward, refresh), Implementation(name, both, refresh)]


def measure(tokens: int, rows: int, chosen: argparse.Namespace) -> None:
    size = 2.0 * tokens * rows
    copy, copied = copy_roof(min(int(size), 4 * 2**30), chosen.device)
    logits = torch.empty(tokens, rows, dtype=torch.bfloat16, device=chosen.device)
    labels = torch.randint(0, rows, (tokens,), device=chosen.device)
    field = [copy]
    for name, loss in losses(chosen.tiny).items():
        field += implementations(loss, name, logits, labels)
    timings = interleaved(field, device=chosen.device, rounds=chosen.rounds, seconds=chosen.seconds)
    work = {c.name: size if c.name.endswith(_FORWARD) else 3 * size for c in field} | {copy.name: copied}
    title = f"logprob, t {tokens:,}, v/tp {rows:,}, bf16; forward and backward unless the name says forward"
    print_table(title, timings, work=work, unit="GB/s", roof=copy.name)


def main() -> None:
    chosen = arguments(__doc__ or "", tokens=[8192, 32_768, 131_072])
    print(heading(chosen.device))
    shapes = [(t, v) for v in chosen.rows for t in chosen.tokens]
    for tokens, rows in [(16, 256)] if chosen.tiny else shapes:
        measure(tokens, rows, chosen)


if __name__ == "__main__":
    main()
