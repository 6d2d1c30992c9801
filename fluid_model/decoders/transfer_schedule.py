"""How many masked tokens each forward writes, where their number is fixed in advance."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


@lru_cache(maxsize=1024)
def even(masks: int, steps: int) -> tuple[int, ...]:
    """Masks shared evenly, the remainder by the first forwards.  (LLaDA; SDAR, public code)"""
    share, rest = divmod(masks, steps)
    return tuple(share + (step < rest) for step in range(steps))


@lru_cache(maxsize=1024)
def by_alpha(masks: int, steps: int, alpha: str) -> tuple[int, ...]:
    """Masks that a reverse diffusion writes in `steps` steps, forwards without any left out.

    As many as expected are written, rounded half to even.  (dLLM, `get_num_transfer_tokens`)
    """
    counts = []
    for share in alpha_shares(steps, alpha):
        counts.append(min(masks, round(masks * share)))
        masks -= counts[-1]
    return tuple(filter(None, counts))


@lru_cache(maxsize=1024)
def alpha_shares(steps: int, alpha: str) -> tuple[float, ...]:
    """Share of the masks that each step from t = 1 to 0 writes, 1 at the last; in float32, as in the public code.

    alpha: linear, 1 - t; cosine, 1 - cos(pi / 2 * (1 - t)). A step from t to s writes a mask with probability
    1 - (1 - alpha(s)) / (1 - alpha(t)).  (dLLM; MDLM, arXiv 2406.07524)
    """
    time = torch.arange(steps, -1, -1).double().div(steps).float()
    kept = 1 - time if alpha == "linear" else 1 - torch.cos(math.pi / 2 * (1 - time))
    masked = 1 - kept
    return tuple((1 - (masked[1:] / masked[:-1]).double()).tolist())
