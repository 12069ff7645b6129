"""Times `ranking_loss` and its torch reference on examples of 2 and 3 responses of 512 tokens.

    PYTHONPATH=kernels python kernels/benchmarks/bench_ranking_loss.py

The forward pass reads scores and pairs, and writes margins and gradient. The backward pass scales the
gradient. A pack has few responses, so the time is that of the launches, and the time between events includes
a part of it.
"""

import functools

import torch
from megatron_post_kernels.ranking_loss import ranking_loss
from passes import FORWARD, Loss, passes
from timing import Implementation, arguments, copy_roof, heading, interleaved, print_table
from torch import Tensor

RESPONSE = 512  # tokens


def examples(responses: int) -> tuple[list[int], list[int], list[float]]:
    """Better response, worse response and weight of each pair. Examples have 3 and 2 responses in turn."""
    better, worse, weights = [], [], []
    start, size = 0, 3
    while start + size <= responses:
        members = range(start, start + size)
        pairs = [(a, b) for a in members for b in members if a < b]
        better += [a for a, _ in pairs]
        worse += [b for _, b in pairs]
        weights += [1 / len(pairs)] * len(pairs)
        start, size = start + size, 5 - size
    return better, worse, weights


def implementations(
    responses: int, device: str, *, compiled: bool
) -> tuple[list[Implementation], dict[str, float]]:
    """Implementations, each without and with its backward pass, and the bytes that each moves."""
    better, worse, weights = (torch.tensor(column, device=device) for column in examples(responses))
    leaf = torch.randn(responses, device=device, requires_grad=True)

    def loss(scores: Tensor, *, impl: str) -> Tensor:
        return ranking_loss(scores, better, worse, weights, impl=impl)[0]  # type: ignore[arg-type]

    losses: dict[str, Loss] = {
        "megatron-post": functools.partial(loss, impl="auto"),
        "torch eager": functools.partial(loss, impl="torch"),
    }
    if compiled:
        losses["torch.compile"] = torch.compile(losses["torch eager"])

    forward_bytes = 8.0 * responses + 24.0 * len(better)
    field = passes(losses, leaf)
    work = {c.name: forward_bytes + (0 if c.name.endswith(FORWARD) else 8.0 * responses) for c in field}
    copy, copied = copy_roof(int(forward_bytes) // 2, device)
    return [copy, *field], work | {copy.name: copied}


def main() -> None:
    chosen = arguments(__doc__ or "", tokens=[8192, 32_768, 131_072])
    print(heading(chosen.device))
    for responses in [12] if chosen.tiny else [tokens // RESPONSE for tokens in chosen.tokens]:
        field, work = implementations(responses, chosen.device, compiled=not chosen.tiny)
        timings = interleaved(field, device=chosen.device, rounds=chosen.rounds, seconds=chosen.seconds)
        title = (
            f"ranking_loss, {responses:,} responses, fp32; forward and backward unless the name says forward"
        )
        print_table(title, timings, work=work, unit="GB/s", roof="copy")


if __name__ == "__main__":
    main()
