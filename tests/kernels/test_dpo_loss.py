"""The DPO loss, its gradient and metrics, in torch and in kernels, against loops in double precision."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron_post_kernels.dpo_loss import PairTerms, dpo_loss, pair_terms, segment_sums
from megatron_post_kernels.pair_losses import LOSSES, DPOSettings
from torch import Tensor

from megatron_post.parallel.context import ContextSplit, sum_over_ranks
from tests.kernels.interpreter import kernel_device, on_kernels
from tests.ranks import run_ranks

NAN = math.nan
IMPLEMENTATIONS = ["torch", "triton"]
SETTINGS = DPOSettings(beta=0.3, label_smoothing=0.1, margin=0.5, nll_weight=0.2)


@dataclass(frozen=True)
class Pack:
    """Segments of a pack and its pairs, in CPU tensors."""

    logps: Tensor
    reference: Tensor | None
    trained: Tensor
    cu_seqlens: Tensor
    pairs: tuple[tuple[int, int], ...]


def _pack(
    lengths: list[int],
    pairs: list[tuple[int, int]],
    *,
    trained: float = 0.7,
    seed: int = 0,
    scale: float = 1.0,
) -> Pack:
    """Random log-probabilities, with NaN for untrained tokens. trained: the share of trained tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    mask = torch.rand(tokens, generator=generator) < trained
    logps, reference = -scale * torch.rand(2, tokens, generator=generator)
    return Pack(
        logps=logps.where(mask, NAN),
        reference=reference.where(mask, NAN),
        trained=mask,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        pairs=tuple(pairs),
    )


def _run(pack: Pack, settings: DPOSettings, weights: list[float] | None = None, **kwargs: Any) -> Any:
    """The terms as lists by name, and the gradient of the sum of weight x loss as a list."""
    device = kernel_device()
    logps = pack.logps.detach().clone().to(device).requires_grad_()
    chosen, rejected = torch.tensor(pack.pairs, dtype=torch.long, device=device).reshape(-1, 2).T
    terms = dpo_loss(
        logps,
        None if pack.reference is None else pack.reference.to(device),
        pack.trained.to(device),
        cu_seqlens=pack.cu_seqlens.to(device),
        chosen=chosen,
        rejected=rejected,
        settings=settings,
        **kwargs,
    )
    upstream = torch.ones(len(pack.pairs)) if weights is None else torch.tensor(weights)
    (terms.loss * upstream.to(device)).sum().backward()
    assert logps.grad is not None
    assert not any(value.requires_grad for name, value in vars(terms).items() if name != "loss")
    return {name: value.tolist() for name, value in vars(terms).items()}, logps.grad.tolist()


def _by_hand(pack: Pack, settings: DPOSettings, weights: list[float] | None = None) -> Any:
    """The same values from loops over tokens. Derivatives are central differences of the formula."""
    offsets, logps = pack.cu_seqlens.tolist(), pack.logps.tolist()
    reference = logps if pack.reference is None else pack.reference.tolist()

    def tokens(segment: int) -> list[int]:
        return [t for t in range(offsets[segment], offsets[segment + 1]) if pack.trained[t]]

    terms: dict[str, list[float]] = {name: [] for name in PairTerms.__dataclass_fields__}
    gradient = [0.0] * len(logps)
    for (c, r), weight in zip(pack.pairs, weights or [1.0] * len(pack.pairs), strict=True):
        policy, fixed = ([sum(x[t] for t in tokens(s)) for s in (c, r)] for x in (logps, reference))
        counts = [len(tokens(s)) for s in (c, r)]
        values = _pair_by_hand(policy, fixed, counts, settings)
        ratios = [reference[t] - logps[t] for s in (c, r) for t in tokens(s)]
        kl = sum(math.exp(min(x, 60)) - 1 - x for x in ratios) / max(len(ratios), 1)
        rewards = [settings.beta * (p - f) for p, f in zip(policy, fixed, strict=True)]
        for name, value in zip(terms, (*values, *rewards, *policy, kl), strict=True):
            terms[name].append(value)
        for side, segment in enumerate((c, r)):
            step = 1e-5 * max(1.0, abs(policy[side]))
            higher, lower = (
                [p + sign * step * (i == side) for i, p in enumerate(policy)] for sign in (1, -1)
            )
            difference = (
                _pair_by_hand(higher, fixed, counts, settings)[0]
                - _pair_by_hand(lower, fixed, counts, settings)[0]
            )
            for t in tokens(segment):
                gradient[t] += weight * difference / (2 * step)
    return terms, gradient


def _pair_by_hand(
    policy: list[float], fixed: list[float], counts: list[int], settings: DPOSettings
) -> tuple[float, float, float]:
    """The loss with NLL, the loss without it, and the NLL."""

    def lost(x: float) -> float:
        return math.log1p(math.exp(-x)) if x > -30 else -x

    (c, r), (ref_c, ref_r), (n_c, n_r) = policy, fixed, (max(count, 1) for count in counts)
    beta, noise = settings.beta, settings.label_smoothing
    x = beta * (c - ref_c - r + ref_r)
    preference = {
        "sigmoid": lambda: lost(x),
        "ipo": lambda: ((c - ref_c) / n_c - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0.0, 1 - x),
        "robust": lambda: ((1 - noise) * lost(x) - noise * lost(-x)) / (1 - 2 * noise),
        "simpo": lambda: lost(beta * (c / n_c - r / n_r - settings.margin)),
    }[settings.loss]()
    nll = -c / n_c if settings.nll_per_token else -c
    return preference + settings.nll_weight * nll, preference, nll


def _assert_equal(found: Any, expected: Any, *, rel: float = 3e-6, absolute: float = 3e-6) -> None:
    """fp32 sums of up to 3,000 numbers below 1, in blocks, have a relative error of 1e-6.

    The derivatives of the loops have an error of 1e-9.
    """
    (terms, gradient), (wanted, wanted_gradient) = found, expected
    for name, value in wanted.items():
        assert terms[name] == pytest.approx(value, rel=rel, abs=absolute * 10), name
    assert gradient == pytest.approx(wanted_gradient, rel=1e-4, abs=absolute)


RAGGED = _pack(
    [7, 0, 1, 2500, 1030, 64, 3, 12, 5], [(3, 4), (2, 0), (7, 6), (1, 5)], seed=1
)  # segments have more than two blocks of tokens, one token or none, and segment 8 is in no pair


@pytest.mark.parametrize("nll_per_token", [True, False])
@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_against_loops(impl: str, name: str, has_reference: bool, nll_per_token: bool) -> None:
    """Segments have unequal lengths and NaN at untrained tokens. Upstream gradients differ between pairs."""
    settings = replace(SETTINGS, loss=name, nll_per_token=nll_per_token)
    # The log-probabilities are scaled down. With 2,500 tokens in a response the sigmoid would saturate.
    assert RAGGED.reference is not None
    reference = RAGGED.reference / 50 if has_reference else None
    pack = replace(RAGGED, logps=RAGGED.logps / 50, reference=reference)
    weights = [1.0, -2.0, 0.5, 3.0]
    _assert_equal(_run(pack, settings, weights, impl=impl), _by_hand(pack, settings, weights))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_many_pairs(impl: str) -> None:
    """140 pairs are more than one block of pairs in backward.

    Either segment of a pair can be the better one.
    """
    pairs = [(2 * i + i % 2, 2 * i + 1 - i % 2) for i in range(140)]
    pack = _pack([2 + i % 5 for i in range(280)], pairs)
    _assert_equal(_run(pack, SETTINGS, impl=impl), _by_hand(pack, SETTINGS))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_a_segment_in_two_pairs(impl: str) -> None:
    """Its tokens get the gradients of both pairs. They cancel if one response is on both sides of a pair."""
    pack = _pack([6, 4, 5], [(0, 1), (1, 2), (0, 2), (2, 2)])
    _assert_equal(_run(pack, SETTINGS, impl=impl), _by_hand(pack, SETTINGS))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_all_masked(impl: str, name: str) -> None:
    """There is no trained token and all values are NaN.

    Losses are finite, and metrics and gradients are 0.
    """
    pack = _pack([4, 3, 0, 2], [(0, 1), (2, 3)], trained=0.0)
    terms, gradient = _run(pack, replace(SETTINGS, loss=name), impl=impl)
    assert all(map(math.isfinite, terms["loss"])) and gradient == [0.0] * 9
    assert not any(any(terms[key]) for key in terms if key not in ("loss", "preference_loss"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_no_pairs(impl: str) -> None:
    """The pack has only padding."""
    terms, gradient = _run(_pack([5], [], trained=0.0), SETTINGS, impl=impl)
    assert not any(terms.values()) and gradient == [0.0] * 5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_extreme_logps(impl: str, name: str) -> None:
    """The policy's log-probabilities are -1e4 per token in one response and -1e-4 in the other.

    Either response can be the chosen one. The reference's are -1. All results are finite, and margins of
    1e4 saturate the sigmoid exactly.
    """
    pack = _pack([6, 8, 8, 6], [(0, 1), (2, 3)], trained=1.0)
    low, high = torch.full((14,), -1e4), torch.full((14,), -1e-4)
    logps = torch.cat((low[:6], high[:8], high[:8], low[:6]))
    pack = replace(pack, logps=logps, reference=torch.full((28,), -1.0))
    settings = replace(SETTINGS, loss=name)
    found = _run(pack, settings, impl=impl)
    assert all(math.isfinite(x) for values in (*found[0].values(), found[1]) for x in values)
    # A saturated loss is 1e4 or more, so its central differences have 5 digits less than the usual 12.
    _assert_equal(found, _by_hand(pack, settings), rel=1e-5, absolute=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_the_reference(name: str) -> None:
    """Finite differences in float64, with segments of 0, 1 and more tokens."""
    pack = _pack([4, 1, 0, 3], [(0, 1), (2, 3)], trained=0.8)
    logps = pack.logps.nan_to_num(0.0).double().requires_grad_()
    reference = pack.reference.double() if pack.reference is not None else None
    chosen, rejected = torch.tensor(pack.pairs).T

    def losses(logps: Tensor) -> Tensor:
        sums = segment_sums(logps, reference, pack.trained, pack.cu_seqlens)
        return pair_terms(sums, chosen, rejected, replace(SETTINGS, loss=name)).loss

    assert torch.autograd.gradcheck(losses, (logps,))


@on_kernels
def test_bitwise_repeatable() -> None:
    first, second = (_run(RAGGED, SETTINGS, impl="triton") for _ in range(2))
    assert str(first) == str(second)


@on_kernels
def test_context_path_on_one_rank() -> None:
    """Two launches give the same bits as one launch, because the order of summation is the same."""
    one = _run(RAGGED, SETTINGS, impl="triton")
    two = _run(RAGGED, SETTINGS, impl="triton", sum_over_context=lambda x: x)
    assert str(one) == str(two)


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match=r"loss='sigmoidal': choose one of sigmoid, ipo"):
        _run(RAGGED, replace(SETTINGS, loss="sigmoidal"))


@on_kernels
def test_bf16_is_refused() -> None:
    pack = replace(RAGGED, logps=RAGGED.logps.bfloat16())
    with pytest.raises(ValueError, match=r"bfloat16.*call \.float"):
        _run(pack, SETTINGS, impl="triton")


def _context_rank(impl: str, name: str) -> Any:
    """One of two ranks with its zigzag part. The first rank counts the loss."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    pack = _split_pack()
    assert group is not None and pack.reference is not None
    mine = ContextSplit(pack.cu_seqlens, 2).indices(group.rank())
    part = replace(
        pack,
        logps=pack.logps[mine],
        reference=pack.reference[mine],
        trained=pack.trained[mine],
        cu_seqlens=pack.cu_seqlens // 2,
    )
    weights = [float(group.rank() == 0)] * len(pack.pairs)
    terms, gradient = _run(
        part,
        replace(SETTINGS, loss=name),
        weights,
        impl=impl,
        sum_over_context=partial(sum_over_ranks, group=group),
    )
    torch.distributed.destroy_process_group()
    return terms, gradient, mine.tolist()


def _split_pack() -> Pack:
    """A pack in which one rank's part of a response has no trained token.

    The last segment trains only its second token.
    """
    pack = _pack([8, 16, 4, 12, 8, 4], [(1, 0), (3, 4), (2, 5)], seed=3)
    pack.trained[-4:] = torch.tensor([False, True, False, False])
    pack.logps[-3] = -1.5
    pack.reference[-3] = -2.0  # type: ignore[index]
    return pack


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@on_kernels
def test_context_parallel(impl: str, name: str) -> None:
    """Both ranks have complete terms, and their tokens have the gradients of one rank.

    The gradients must not be doubled, although each rank computes the loss.
    """
    pack = _split_pack()
    terms, gradient = _run(pack, replace(SETTINGS, loss=name), impl="torch")
    for found, part, mine in run_ranks(_context_rank, 2, impl, name):
        _assert_equal((found, part), (terms, [gradient[t] for t in mine]))
