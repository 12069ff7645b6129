"""Losses over pairs of responses, from sums of log-probabilities. Each is one function in `LOSSES`.

With a pair's chosen response c and rejected response r, policy pi and reference ref:
    delta = (log pi(c) - log ref(c)) - (log pi(r) - log ref(r)).

A new loss needs a function here with a name in `LOSSES`, a branch of `loss_and_slopes` in
dpo_loss_kernels.py, and the name in `dpo.loss` of the config's schema. The tests of both implementations run
over `LOSSES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DPOSettings:
    """Settings of the loss.

    loss: a name of `LOSSES`. beta: strength of the pull towards the reference. label_smoothing: used by
    `robust`. margin: used by `simpo`. nll_weight: weight of the chosen response's NLL. nll_per_token: whether
    that NLL is a mean over tokens or their sum.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    nll_weight: float = 0.0
    nll_per_token: bool = True


@dataclass(frozen=True)
class PairLogps:
    """Sums over the trained tokens of each response, and the numbers of these tokens, all fp32 [p]."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def delta(self) -> Tensor:
        return (self.chosen - self.reference_chosen) - (self.rejected - self.reference_rejected)


def sigmoid(logps: PairLogps, settings: DPOSettings) -> Tensor:
    """-log sigmoid(beta delta). Rafailov et al. (2023), equation 7. It is ln 2 if policy = reference."""
    return -F.logsigmoid(settings.beta * logps.delta)


def ipo(logps: PairLogps, settings: DPOSettings) -> Tensor:
    """(delta per token - 1 / (2 beta))^2. Azar et al. (2023), equation 17.

    It uses mean log-probabilities, because sums would depend on the length. The authors advise this, and TRL
    does the same.
    """
    chosen = (logps.chosen - logps.reference_chosen) / logps.chosen_lengths.clamp(min=1)
    rejected = (logps.rejected - logps.reference_rejected) / logps.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * settings.beta)) ** 2


def hinge(logps: PairLogps, settings: DPOSettings) -> Tensor:
    """max(0, 1 - beta delta). Zhao et al. (2023), SLiC, with DPO's delta."""
    return F.relu(1 - settings.beta * logps.delta)


def robust(logps: PairLogps, settings: DPOSettings) -> Tensor:
    """((1 - e) l(delta) - e l(-delta)) / (1 - 2e) with l = -log sigmoid(beta .).

    It is unbiased if a share e of the labels is flipped. Chowdhury et al. (2024), equation 12.
    """
    noise, logits = settings.label_smoothing, settings.beta * logps.delta
    return (-(1 - noise) * F.logsigmoid(logits) + noise * F.logsigmoid(-logits)) / (1 - 2 * noise)


def simpo(logps: PairLogps, settings: DPOSettings) -> Tensor:
    """-log sigmoid(beta (mean log pi(c) - mean log pi(r) - margin)), without a reference.

    Meng et al. (2024), equation 6. Their gamma is beta x margin.
    """
    chosen = logps.chosen / logps.chosen_lengths.clamp(min=1)
    rejected = logps.rejected / logps.rejected_lengths.clamp(min=1)
    return -F.logsigmoid(settings.beta * (chosen - rejected - settings.margin))


LOSSES: dict[str, Callable[[PairLogps, DPOSettings], Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
}


def chosen_nll(chosen: Tensor, lengths: Tensor, *, per_token: bool) -> Tensor:
    """-log pi(c) of each pair, fp32 [p], as a mean over the response's tokens or as their sum."""
    return -chosen / lengths.clamp(min=1) if per_token else -chosen
