"""Autoregressive decoding: one token a forward, greedy or by nucleus sampling.

Legend: n active rows, R rows just admitted, D hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..engine.records import Request
from ..engine.strategy import Feed, OneEach
from ..forward.backbone import Backbone
from ..settings import ArSettings
from .sampling import Draws, argmax, choose


class ArStrategy:
    """State of a row: its latest token, committed to the answer but not cached yet, and its random numbers."""

    max_slots = 1
    prefills_prompt = True
    prompt_mask_block: tuple[int, ...] = ()
    draft_policy = None

    def __init__(self, backbone: Backbone, settings: ArSettings, *, stride: int = 0, ahead: int = 1) -> None:
        """stride: that each step reports; 1 where these are steps of a decoder with strides, else 0.
        ahead: random numbers that such a decoder looks at.
        """
        self.backbone = backbone
        self._stride, self._ahead = stride, ahead
        self.settings = settings

    def allocate(self, rows: int) -> None:
        self.latest = torch.zeros(rows, dtype=torch.long, device=self.backbone.device)
        self.draws = Draws(rows, self._ahead)
        self._widths = np.ones(rows, np.int64)

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]) -> OneEach:
        assert hidden is not None
        for row, request in enumerate(requests, start):
            self.draws.seed(row, request.seed)
        return self._choose(start, hidden[:, 0], kept=0, stride=0)

    def plan(self, rows: int) -> Feed:
        return Feed(self.latest[:rows, None], self._widths[:rows], kinds=["commit"] * rows)

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> OneEach:
        return self._choose(0, hidden[:, 0], kept=1, stride=self._stride)

    def move(self, source: int, target: int) -> None:
        self.latest[target] = self.latest[source]
        self.draws.move(source, target)

    def _choose(self, start: int, hidden: Tensor, kept: int, stride: int) -> OneEach:
        """The next token of rows start.. .  hidden: (n, D).  kept: fed slots of each row that stay cached."""
        rows = slice(start, start + len(hidden))
        logits = self.backbone.logits(hidden)  # (n, V)
        if self.settings.temperature == 0:
            tokens = argmax(logits)  # (n,)
        else:
            draws = self.draws.peek(rows, 1)[:, 0].to(logits.device)  # (n,)
            tokens, _ = choose(logits, draws, self.settings.temperature, self.settings.top_p, "probability")
            self.draws.advance(rows, 1)
        self.latest[rows] = tokens
        return OneEach(tokens.cpu(), kept, stride)


def open_strategy(checkpoint: Checkpoint, settings: ArSettings) -> ArStrategy:
    """The strategy of these settings."""
    return ArStrategy(checkpoint.backbone, settings)
