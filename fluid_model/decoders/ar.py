"""Autoregressive decoding: feed one token, keep it.

Legend: n active rows, R rows just admitted, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..forward.backbone import Backbone
from ..settings import ArSettings
from .sampling import Draws, choose, likeliest


class ArStrategy:
    """Greedy or nucleus sampling. The newest token is pending: committed to the answer, not yet in the cache."""

    widest = 1
    reads_prompt = True
    behind_prompt: tuple[int, ...] = ()
    draft_policy = None

    def __init__(self, backbone: Backbone, settings: ArSettings) -> None:
        self.backbone = backbone
        self.settings = settings

    def allocate(self, slots: int) -> None:
        self._pending = torch.zeros(slots, dtype=torch.long, device=self.backbone.device)
        self._draws = Draws(slots)

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        assert hidden is not None
        for slot, request in enumerate(requests, start):
            self._draws.seed(slot, request.seed)
        return self._choose(start, hidden[:, 0], keep=0)

    def plan(self, rows: int) -> Feed:
        return Feed(self._pending[:rows, None], widths=[1] * rows, kinds=["commit"] * rows)

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        return self._choose(0, hidden[:, 0], keep=1)

    def move(self, source: int, target: int) -> None:
        self._pending[target] = self._pending[source]
        self._draws.move(source, target)

    def _choose(self, start: int, hidden: Tensor, keep: int) -> Absorbed:
        slots = range(start, start + len(hidden))
        logits = self.backbone.logits(hidden)  # (n, V)
        if self.settings.temperature == 0:
            chosen = likeliest(logits)
        else:
            draws = self._draws.peek(slots, 1)[:, 0].to(logits.device)
            chosen, _ = choose(logits, draws, self.settings.temperature, self.settings.top_p, "probability")
            for slot in slots:
                self._draws.take(slot, 1)
        self._pending[start : slots.stop] = chosen
        return Absorbed(tokens=[[token] for token in chosen.tolist()], keep=[keep] * len(slots))
