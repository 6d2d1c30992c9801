"""The K-head: reads a hidden state, says how many tokens to write next.

Legend: D hidden, K widest stride (K_max), R rows.
"""

from __future__ import annotations

from torch import Tensor, nn


class KHead(nn.Sequential):
    """Linear(D, D/4) -> GELU -> Linear(D/4, K); class i means stride i + 1.  (FLUID, elastic horizons)

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
        weight = next(self.parameters())
        scores: Tensor = self(hidden.to(dtype=weight.dtype, device=weight.device))
        return scores.argmax(-1) + 1
