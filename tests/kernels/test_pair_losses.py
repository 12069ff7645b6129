"""Each preference loss, worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from megatron_post_kernels.pair_losses import LOSSES, DPOSettings, PairLogps, chosen_nll
from torch import Tensor

NAN = float("nan")


def _pair(chosen: float, rejected: float, *, lengths: tuple[int, int] = (4, 2)) -> PairLogps:
    """One pair whose reference has log-probabilities -6 and -5."""
    values = (chosen, rejected, -6.0, -5.0, *lengths)
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in values))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", DPOSettings(beta=0.5), 0.31326),
        ("ipo", DPOSettings(beta=0.5), 0.0625),
        ("hinge", DPOSettings(beta=0.25), 0.5),
        ("robust", DPOSettings(beta=0.5, label_smoothing=0.2), -0.02007),
        ("simpo", DPOSettings(beta=2.0, margin=0.5), 0.07889),
    ],
)
def test_worked_by_hand(name: str, settings: DPOSettings, expected: float) -> None:
    """The log-ratios of a pair are 1 and -1, so delta is 2.

    The policy gives the chosen response (4 tokens) -5 and the rejected one (2 tokens) -6. The reference gives
    them -6 and -5.
    sigmoid  -log sigmoid(0.5 x 2) = log(1 + e^-1) = 0.31326
    ipo      per token 1 / 4 and -1 / 2: (0.75 - 1 / (2 x 0.5))^2 = 0.0625, and not (2 - 1)^2 = 1
    hinge    1 - 0.25 x 2 = 0.5
    robust   (0.8 x 0.31326 - 0.2 x 1.31326) / 0.6 = -0.02007, because unbiased estimates can be negative
    simpo    means -1.25 and -3: -log sigmoid(2 (1.75 - 0.5)) = log(1 + e^-2.5) = 0.07889
    """
    loss = LOSSES[name](_pair(-5.0, -6.0), settings)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sigmoid", math.log(2)), ("ipo", 25.0), ("hinge", 1.0), ("robust", math.log(2))],
)
def test_policy_equals_reference(name: str, expected: float) -> None:
    """The losses at delta 0: ln 2, (0 - 1 / (2 x 0.1))^2 = 25, 1 and (0.8 ln 2 - 0.2 ln 2) / 0.6 = ln 2."""
    loss = LOSSES[name](_pair(-6.0, -5.0), DPOSettings(beta=0.1, label_smoothing=0.2))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    torch.manual_seed(0)
    chosen, rejected, fixed_chosen, fixed_rejected = torch.randn(4, 6, dtype=torch.float64)
    lengths = torch.arange(1, 13, dtype=torch.float64).reshape(2, 6)
    settings = DPOSettings(beta=0.3, label_smoothing=0.1, margin=0.5)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return LOSSES[name](PairLogps(a, b, fixed_chosen, fixed_rejected, *lengths), settings)

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_prefers_the_chosen(name: str) -> None:
    """A step against the gradient raises log pi(chosen) and lowers log pi(rejected)."""
    pair = _pair(-6.0, -5.0)
    pair.chosen.requires_grad_(), pair.rejected.requires_grad_()
    LOSSES[name](pair, DPOSettings(beta=0.1, label_smoothing=0.1, margin=0.5)).sum().backward()
    assert pair.chosen.grad.item() < 0 < pair.rejected.grad.item()


def test_sigmoid_gradient_by_hand() -> None:
    """d/d chosen = -beta sigmoid(-beta delta) = -0.5 x sigmoid(-1) = -0.5 x 0.26894 = -0.13447."""
    pair = _pair(-5.0, -6.0)
    pair.chosen.requires_grad_(), pair.rejected.requires_grad_()
    LOSSES["sigmoid"](pair, DPOSettings(beta=0.5)).sum().backward()
    assert pair.chosen.grad.item() == pytest.approx(-0.13447, abs=1e-5)
    assert pair.rejected.grad.item() == pytest.approx(0.13447, abs=1e-5)


def test_hinge_stops_beyond_its_margin() -> None:
    """beta delta = 0.1 x 20 > 1, so loss and gradient are 0."""
    pair = _pair(4.0, -15.0)
    pair.chosen.requires_grad_()
    loss = LOSSES["hinge"](pair, DPOSettings(beta=0.1))
    loss.sum().backward()
    assert loss.item() == 0.0 and pair.chosen.grad.item() == 0.0


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_robust_is_unbiased(noise: float) -> None:
    """With a share e of labels flipped, (1 - e) robust(delta) + e robust(-delta) is the clean loss."""
    pair = _pair(-5.0, -6.0)
    flipped = PairLogps(
        pair.rejected, pair.chosen, pair.reference_rejected, pair.reference_chosen, *[None] * 2
    )
    settings = DPOSettings(beta=0.5, label_smoothing=noise)
    mean = (1 - noise) * LOSSES["robust"](pair, settings) + noise * LOSSES["robust"](flipped, settings)
    torch.testing.assert_close(mean, LOSSES["sigmoid"](pair, settings))


def test_simpo_needs_no_reference() -> None:
    """The reference does not change the loss.

    Of equal log-probabilities, the longer response is preferred.
    """
    settings = DPOSettings(beta=2.0, margin=0.5)
    pair = _pair(-5.0, -6.0)
    other = replace(pair, reference_chosen=torch.full_like(pair.chosen, NAN))
    assert torch.equal(LOSSES["simpo"](pair, settings), LOSSES["simpo"](other, settings))
    longer = LOSSES["simpo"](_pair(-5.0, -6.0, lengths=(5, 2)), settings)
    assert longer < LOSSES["simpo"](pair, settings)


def test_nll_normalisation() -> None:
    """-6 over 4 tokens is 1.5 per token and 6 per sequence. Without trained tokens it is 0 and not 0 / 0."""
    chosen, lengths = torch.tensor([-6.0, 0.0]), torch.tensor([4.0, 0.0])
    assert chosen_nll(chosen, lengths, per_token=True).tolist() == [1.5, 0.0]
    assert chosen_nll(chosen, lengths, per_token=False).tolist() == [6.0, 0.0]
