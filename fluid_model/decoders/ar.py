"""Autoregressive decoding: feed one token, keep it.

Legend: n active rows, R rows just admitted, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backbone import Backbone
from ..engine.strategy import Absorbed, Feed
from ..settings import ArSettings


class ArStrategy:
    """Greedy or nucleus sampling. The newest token is pending: committed to the answer, not yet in the cache."""

    widest = 1

    def __init__(self, backbone: Backbone, settings: ArSettings) -> None:
        self.backbone = backbone
        self.settings = settings

    def allocate(self, slots: int) -> None:
        self._pending = torch.zeros(slots, dtype=torch.long, device=self.backbone.device)
        self._random: list[torch.Generator] = [torch.Generator() for _ in range(slots)]

    def admit(self, start: int, hidden: Tensor, seeds: list[int], rooms: list[int]) -> Absorbed:
        for slot, seed in enumerate(seeds, start):
            self._random[slot] = torch.Generator().manual_seed(seed)
        return self._choose(start, hidden, keep=0)

    def plan(self, rows: int) -> Feed:
        return Feed(self._pending[:rows, None], widths=[1] * rows, kinds=["commit"] * rows)

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        return self._choose(0, hidden[:, 0], keep=1)

    def move(self, source: int, target: int) -> None:
        self._pending[target] = self._pending[source]
        self._random[target] = self._random[source]

    def _choose(self, start: int, hidden: Tensor, keep: int) -> Absorbed:
        rows = len(hidden)
        logits = self.backbone.logits(hidden)  # (n, V)
        if self.settings.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            draws = torch.stack([torch.rand((), generator=g) for g in self._random[start : start + rows]])
            chosen = sample(logits, draws.to(logits.device), self.settings.temperature, self.settings.top_p)
        self._pending[start : start + rows] = chosen
        return Absorbed(tokens=[[token] for token in chosen.tolist()], keep=[keep] * rows)


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Nucleus sampling by inverse distribution function, so that one uniform number a row decides.

    logits: (n, V).  draws: (n,) in [0, 1).  Returns (n,) ids.  (Holtzman et al. 2020, nucleus sampling)
    """
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)  # (n, V)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # the most likely token always stays
    reached = probabilities.cumsum(-1)
    rank = (reached <= draws[:, None] * reached[:, -1:]).sum(-1, keepdim=True)  # (n, 1)
    return order.gather(-1, rank.clamp(max=logits.shape[-1] - 1))[:, 0]
