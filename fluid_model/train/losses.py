"""Losses and labels of the training stages: pure functions of tensors.

L_AR is next-token cross-entropy on the response, L_Diff cross-entropy of mask predictions (FLUID, arXiv 2605.27387;
NBDiff, arXiv 2512.06776; LLaDA, arXiv 2502.09992). The K-head's label K* and its loss are FLUID's horizon calibration.

Legend: M slots with a label, A anchors of mask blocks, K widest stride (K_max), T taus, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SIGMA = 1.5
"""Width of the horizon target, in stride classes.  (FLUID, horizon calibration)"""
EPSILON = 1e-9
"""Keeps the mean over no slots at 0."""


class LossTerms(NamedTuple):
    """The minimised loss and its two terms, () each. A term without slots is 0."""

    total: Tensor
    ar: Tensor
    diff: Tensor


def combine_losses(
    losses: Tensor,
    ar_weight: Tensor,
    diff_weight: Tensor,
    diff_count: Tensor,
    term_weights: tuple[float, float] | None,
) -> LossTerms:
    """L_AR and L_Diff as weighted means, and their weighted sum.

    losses: (M,) cross-entropy in nats.  ar_weight, diff_weight: (M,) weight of each slot in a term.  diff_count: ()
    divisor of L_Diff.  term_weights: of L_AR and L_Diff; None takes one mean over all slots of both, as FLUID's
    published code does, so that each term counts by its number of slots.
    """
    ar_sum = (losses * ar_weight).sum()
    diff_sum = (losses * diff_weight).sum()
    ar_count = ar_weight.sum()
    ar = ar_sum / ar_count.clamp(min=EPSILON)
    diff = diff_sum / diff_count.clamp(min=EPSILON)
    if term_weights is None:
        total = (ar_sum + diff_sum) / (ar_count + diff_count).clamp(min=EPSILON)
    else:
        total = term_weights[0] * ar + term_weights[1] * diff
    return LossTerms(total, ar, diff)


def best_stride(losses: Tensor, valid: Tensor, tau: Tensor) -> Tensor:
    """K*: the largest k whose mean loss over the first k slots is below tau, else 1.  (FLUID, horizon calibration)

    losses: (A, K) cross-entropy of a mask block's slots in nats.  valid: (A, K) bool, False where the mask block has no
    slot: past the end of the response (see `row_layouts.AllMaskLayout`).  tau: (T,) bounds in nats.
    Returns (T, A) long in 1..K. For losses 1, 2, 6 the means are 1, 1.5, 3: K* is 2 at tau 2.8.
    """
    sums = torch.where(valid, losses, 0.0).cumsum(-1)
    mean = sums / valid.cumsum(-1).clamp(min=1)  # (A, K)
    below = valid & (mean < tau[:, None, None])  # (T, A, K)
    strides = torch.arange(1, losses.shape[-1] + 1, device=losses.device)
    return (below * strides).amax(-1).clamp(min=1)


def horizon_target(stride: Tensor, k_max: int) -> Tensor:
    """The K-head's target distribution, a Gaussian over classes centred at stride - 1: (...,) long -> (..., K)."""
    classes = torch.arange(k_max, device=stride.device)
    distance = (classes - (stride[..., None] - 1)).float()
    weight = torch.exp(-(distance**2) / (2 * SIGMA**2))
    return weight / weight.sum(-1, keepdim=True)


def horizon_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of K-head logits (..., K) against a target distribution, mean over rows: KL up to a constant."""
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1, target.shape[-1]))
