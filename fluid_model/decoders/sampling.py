"""What token, and how sure: shared by the decoders.

Legend: n rows or slots, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings import Rule


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Nucleus sampling by inverse distribution function, so that one uniform number a row decides.

    logits: (n, V).  draws: (n,) in [0, 1).  Returns (n,) ids.  (Holtzman et al. 2020, nucleus sampling)
    """
    probabilities, order = nucleus(logits / temperature, top_p)
    reached = probabilities.cumsum(-1)
    rank = (reached <= draws[:, None] * reached[:, -1:]).sum(-1, keepdim=True)  # (n, 1)
    return order.gather(-1, rank.clamp(max=logits.shape[-1] - 1))[:, 0]


def nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order, those outside the nucleus 0, and the ids they belong to: (n, V) each."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0.0), order  # the most likely token always stays


def choose(logits: Tensor, draws: Tensor, temperature: float, top_p: float, rule: Rule) -> tuple[Tensor, Tensor]:
    """A token a row and how sure it is, the surer the larger.

    logits: (n, V).  draws: (n,).  Sureness: the token's probability; the gap between the two likeliest; or minus the
    entropy in nats, each after temperature and nucleus.  Returns (n,) ids and (n,) sureness.  (NBDiff, public decoder)
    """
    scaled = logits / temperature if temperature > 0 else logits
    probabilities, order = nucleus(scaled, top_p)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if temperature > 0:
        rank = (probabilities.cumsum(-1) <= draws[:, None]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    else:
        rank = torch.zeros_like(order[:, :1])
    token = order.gather(-1, rank)[:, 0]
    if rule == "probability":
        return token, probabilities.gather(-1, rank)[:, 0]
    if rule == "margin":
        return token, probabilities[:, 0] - probabilities[:, 1]
    return token, torch.special.xlogy(probabilities, probabilities).sum(-1)
