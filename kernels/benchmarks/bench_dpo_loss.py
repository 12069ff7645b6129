"""Times `dpo_loss` and its torch reference, and what it adds to a linear cross-entropy.

    PYTHONPATH=kernels python kernels/benchmarks/bench_dpo_loss.py

The first tables start from log-probabilities of responses of 512 tokens. The forward pass reads the policy,
the reference and the mask. The backward pass reads the mask and writes the gradient. Operations of this size
are bound by their launches, and the time between events includes a part of the launches.

The second tables start from hidden states, with a cached reference. They compare forward and backward with
the plain sum of -logp of the same tokens.
"""

import functools

import torch
from megatron_post_kernels.dpo_loss import dpo_loss
from megatron_post_kernels.linear_logprob import linear_logprob
from megatron_post_kernels.pair_losses import DPOSettings
from passes import FORWARD, Loss, passes
from timing import Implementation, arguments, copy_roof, heading, interleaved, matmul_roof, print_table
from torch import Tensor

RESPONSE = 512  # tokens
SETTINGS = DPOSettings(nll_weight=0.2)


def pair_losses(tokens: int, response: int, device: str) -> dict[str, Loss]:
    """Functions of log-probabilities [t] that sum the loss over pairs of neighbouring responses, by name.

    Half of each response is trained.
    """
    cu_seqlens = torch.arange(0, tokens + 1, response, dtype=torch.int32, device=device)
    chosen, rejected = torch.arange(tokens // response, device=device).reshape(-1, 2).T.contiguous()
    trained = torch.arange(tokens, device=device) % response >= response // 2
    reference = -torch.rand(tokens, device=device)

    def loss(logps: Tensor, *, impl: str) -> Tensor:
        terms = dpo_loss(
            logps,
            reference,
            trained,
            cu_seqlens=cu_seqlens,
            chosen=chosen,
            rejected=rejected,
            settings=SETTINGS,
            impl=impl,  # type: ignore[arg-type]
        )
        return terms.loss.sum()

    return {
        "megatron-post": functools.partial(loss, impl="auto"),
        "torch eager": functools.partial(loss, impl="torch"),
    }


def from_logps(
    tokens: int, response: int, device: str, *, compiled: bool
) -> tuple[list[Implementation], dict[str, float]]:
    """Implementations, each without and with its backward pass, and the bytes that each moves."""
    losses = pair_losses(tokens, response, device)
    if compiled:
        losses["torch.compile"] = torch.compile(losses["torch eager"])
    field = passes(losses, torch.zeros(tokens, device=device).uniform_(-1, 0).requires_grad_())
    work = {c.name: (9.0 if c.name.endswith(FORWARD) else 14.0) * tokens for c in field}
    copy, copied = copy_roof(7 * tokens, device)
    return [copy, *field], work | {copy.name: copied}


def from_hidden(
    tokens: int, rows: int, width: int, response: int, device: str
) -> tuple[list[Implementation], dict[str, float]]:
    """The plain loss and DPO with NLL, both on `linear_logprob`, and the operations that each needs."""
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn(rows, width, dtype=torch.bfloat16, device=device).div_(width**0.5).requires_grad_()
    labels = torch.randint(0, rows, (tokens,), device=device)

    def step(loss: Loss) -> Tensor:
        value = loss(linear_logprob(hidden, weight, labels))
        torch.autograd.grad(value, (hidden, weight))
        return value.detach()

    roof, operations = matmul_roof(min(tokens, 8192), rows, width, device)
    losses = pair_losses(tokens, response, device)
    field = [
        roof,
        Implementation("sum of -logp", functools.partial(step, lambda logps: -logps.sum())),
        Implementation("DPO + NLL, megatron-post", functools.partial(step, losses["megatron-post"])),
        Implementation("DPO + NLL, torch eager", functools.partial(step, losses["torch eager"])),
    ]
    work = {implementation.name: 6.0 * tokens * rows * width for implementation in field}
    return field, work | {roof.name: operations}


def main() -> None:
    chosen = arguments(__doc__ or "", tokens=[8192, 32_768, 131_072], hidden=[4096])
    device, response = chosen.device, 4 if chosen.tiny else RESPONSE
    print(heading(device))
    for tokens in [64] if chosen.tiny else chosen.tokens:
        field, work = from_logps(tokens, response, device, compiled=not chosen.tiny)
        timings = interleaved(field, device=device, rounds=chosen.rounds, seconds=chosen.seconds)
        title = f"dpo_loss, t {tokens:,}, fp32; forward and backward unless the name says forward"
        print_table(title, timings, work=work, unit="GB/s", roof="copy")
    shapes = [(t, v, h) for h in chosen.hidden for v in chosen.rows for t in chosen.tokens]
    for tokens, rows, width in [(64, 256, 32)] if chosen.tiny else shapes:
        field, work = from_hidden(tokens, rows, width, response, device)
        timings = interleaved(field, device=device, rounds=chosen.rounds, seconds=chosen.seconds)
        title = f"linear_logprob + loss, t {tokens:,}, h {width:,}, v/tp {rows:,}; forward and backward"
        print_table(title, timings, work=work, unit="TFLOP/s", roof="cuBLAS")


if __name__ == "__main__":
    main()
