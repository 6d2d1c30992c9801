"""The K-head: predicts from a hidden state how many tokens to draft next.  (FLUID, elastic horizons)

Legend: D hidden, K widest stride (K_max), R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import compiled


class KHead(nn.Sequential):
    """Linear(D, D/4) -> GELU -> Linear(D/4, K); class i means stride i + 1.

    Input: (R, D) last-layer hidden state after the final norm, at the last committed token. Output: (R, K) logits.
    """

    def __init__(self, hidden_size: int, k_max: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, hidden_size // 4),
            nn.GELU(),
            nn.Linear(hidden_size // 4, k_max),
        )
        self.k_max = k_max
        """Widest stride this head can predict."""

    def stride(self, hidden: Tensor) -> Tensor:
        """Most likely stride per row: (R, D) -> (R,) long in 1..K."""
        first, _, second = self
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        strides = compiled.strides(first, second, hidden)
        if strides is not None:
            return strides
        hidden = hidden.to(dtype=first.weight.dtype, device=first.weight.device)
        half = functional.linear(hidden, first.weight, first.bias) * 0.5
        # GELU in elementary operations: torch's own may compile a kernel for every new shape.
        activated = torch.addcmul(half, half, torch.erf(half * 2**0.5))  # (R, D/4)
        return functional.linear(activated, second.weight, second.bias).argmax(-1) + 1
