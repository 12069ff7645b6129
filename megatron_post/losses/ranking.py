"""Ranking loss of the reward model: `-log sigmoid(r_better - r_worse)`, no margin term.

"The Llama 3 Herd of Models", section 4.1.1; Ouyang et al. (2022), equation 1, over all ranked pairs of an
example.
"""

import torch.nn.functional as F
from torch import Tensor


def ranking_loss(better: Tensor, worse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of `-log sigmoid(better - worse)`, and the margins.

    better, worse: fp32 [p], scores of each pair's responses; weights: [p], 1 / pairs of the example.
    Returns (loss sum [], margins [p]). With equal scores a pair gives ln 2.
    """
    margins = better - worse
    return -(weights * F.logsigmoid(margins)).sum(), margins
