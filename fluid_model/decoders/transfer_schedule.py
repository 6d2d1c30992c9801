"""How many tokens each denoise forward of a block writes, where their number is fixed in advance."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def even(block_length: int, steps: int) -> tuple[int, ...]:
    """A block's tokens shared evenly, the remainder by the first forwards.  (LLaDA; SDAR, public code)"""
    share, rest = divmod(block_length, steps)
    return tuple(share + (step < rest) for step in range(steps))


@lru_cache(maxsize=1024)
def by_alpha(masks: int, steps: int, alpha: str) -> tuple[int, ...]:
    """Masks that a reverse diffusion writes in `steps` steps from t = 1 to 0, forwards without any left out.

    alpha: linear, 1 - t; cosine, 1 - cos(pi / 2 * (1 - t)). A step from t to s writes each mask with probability
    1 - (1 - alpha(s)) / (1 - alpha(t)); as many are written as expected, rounded half to even, in float32 as in the
    public code.  (dLLM, `get_num_transfer_tokens`; MDLM, arXiv 2406.07524)
    """
    counts = []
    for step in range(steps):
        later, now = _masked_share((steps - step - 1) / steps, alpha), _masked_share((steps - step) / steps, alpha)
        count = min(masks, round(masks * (1 - float(later / now))))
        masks -= count
        counts.append(count)
    return tuple(filter(None, counts))


def _masked_share(t: float, alpha: str) -> Tensor:
    """1 - alpha(t), a float32 scalar."""
    time = torch.tensor(t, dtype=torch.float32)
    return 1 - (1 - time if alpha == "linear" else 1 - torch.cos((math.pi / 2) * (1 - time)))
