"""Noise of masked diffusion: how many tokens a time t masks, and what their loss weighs. No torch.

A schedule keeps the share alpha(t) of the tokens, from all at t = 0 to none at t = 1. A masked token's loss weighs
-alpha'(t) / (1 - alpha(t)), the weight of the continuous-time bound (MDLM, arXiv 2406.07524, equation 10):

    schedule  masked share 1 - alpha(t)  weight                     t = 0.1      0.5      0.9
    linear    t                          1 / t                         10.0      2.0      1.1
    cosine    cos(pi/2 (1 - t))          pi/2 tan(pi/2 (1 - t))         9.92     1.57     0.25

The names and forms are dLLM's (ZHZisZZ/dllm at ca17675, dllm/core/schedulers/alpha.py).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from ..settings import check_range

ScheduleName = Literal["linear", "cosine"]


@dataclass(frozen=True)
class NoiseSpec:
    """Settings of the noise in the stages llada, mdlm and bd3lm. Each example draws one t ~ U[epsilon, 1).

    schedule: see the module's docstring.  epsilon: smallest t.  weight: of a masked token's loss, by the schedule, or
    1 for all (uniform).
    """

    schedule: ScheduleName = "linear"
    epsilon: float = 1e-3
    weight: Literal["schedule", "uniform"] = "schedule"

    def __post_init__(self) -> None:
        check_range("noise.epsilon", self.epsilon, 0.0, 1.0, open_low=True)

    def draw_time(self, rng: random.Random) -> float:
        """One t."""
        return self.epsilon + (1.0 - self.epsilon) * rng.random()

    def masked_share(self, t: float) -> float:
        """Chance of a token to be masked at t."""
        return t if self.schedule == "linear" else math.cos(math.pi / 2 * (1.0 - t))

    def loss_weight(self, t: float, offset: float = 0.0) -> float:
        """Weight of a masked token's loss at t. offset: added to the divisor, 1 - alpha(t)."""
        if self.weight == "uniform":
            return 1.0
        slope = 1.0 if self.schedule == "linear" else math.pi / 2 * math.sin(math.pi / 2 * (1.0 - t))
        return slope / (self.masked_share(t) + offset)
