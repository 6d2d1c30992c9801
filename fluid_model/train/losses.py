"""Losses and labels of the training stages: pure functions of tensors.

Legend: M slots with a label, A anchors, K widest stride (K_max), T taus, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SIGMA = 1.5
"""Width of the horizon target over stride classes.  (FLUID, horizon calibration)"""


def weighted(
    losses: Tensor, ar: Tensor, diff: Tensor, targets: Tensor, weights: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """L_AR and L_Diff, each a weighted mean, and what is minimised.

    losses: (M,) cross-entropy.  ar, diff: (M,) weight of each slot in L_AR and in L_Diff.  targets: () what L_Diff is a
    mean over.  weights: of L_AR and L_Diff; None is the one mean over both that FLUID's published code takes, which
    weighs each term by its number of slots.  Returns (loss, L_AR, L_Diff); a term without slots is 0.
    """
    sum_ar, sum_diff, count = (losses * ar).sum(), (losses * diff).sum(), ar.sum()
    l_ar, l_diff = (total / number.clamp(min=1e-9) for total, number in ((sum_ar, count), (sum_diff, targets)))
    if weights is None:
        return (sum_ar + sum_diff) / (count + targets).clamp(min=1e-9), l_ar, l_diff
    return weights[0] * l_ar + weights[1] * l_diff, l_ar, l_diff


def best_stride(losses: Tensor, counted: Tensor, tau: Tensor) -> Tensor:
    """K*: the largest k whose mean loss over the first k slots is below tau, 1 if there is none.

    losses: (A, K) cross-entropy of a fan's slots in nats.  counted: (A, K) bool, False where the fan has no slot: past
    the end of the response, but see `layout.MaskFans`.  tau: (T,).  Returns (T, A) long in 1..K.  (FLUID, horizon
    calibration)
    """
    kept = torch.where(counted, losses, 0.0)
    mean = kept.cumsum(-1) / counted.cumsum(-1).clamp(min=1)  # (A, K)
    good = counted & (mean < tau[:, None, None])  # (T, A, K)
    strides = torch.arange(1, losses.shape[-1] + 1, device=losses.device)
    return (good * strides).amax(-1).clamp(min=1)


def horizon_target(stride: Tensor, k_max: int) -> Tensor:
    """A Gaussian over classes centred at stride - 1, normalised: (...,) long -> (..., K)."""
    classes = torch.arange(k_max, device=stride.device)
    distance = (classes - (stride[..., None] - 1)).float()
    weight = torch.exp(-(distance**2) / (2 * SIGMA**2))
    return weight / weight.sum(-1, keepdim=True)


def horizon(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of K-head logits (..., K) against a target distribution, mean over rows (KL up to a constant)."""
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1, target.shape[-1]))
