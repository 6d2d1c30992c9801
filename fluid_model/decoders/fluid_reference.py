"""FLUID's public sampler, batched: K-head stride, confidence fill, causal verification.  (arXiv 2605.27387)

Each row runs its own rounds of three phases, so rows never wait for or read one another:
    denoise   feed the canvas; write the pointer's slot and every later slot that is sure; until none is a mask
    verify    feed the filled canvas; keep it up to the first token greedy AR would not have written, corrected
    commit    feed what was kept, to cache its keys and open the next round from its last hidden state
The prediction for canvas slot j is emitted at slot j - 1 (the next-token shift), slot 0's by the prefix. The commit
after an answer's last token is not run: nothing would read it.

Legend: n active rows, R rows just admitted, S slots fed, K widest stride, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbone import Backbone
from ..engine.records import Kind, Request
from ..engine.strategy import Absorbed, Feed
from ..khead import KHead
from ..settings import FluidSettings

DENOISE, VERIFY, COMMIT = range(3)
KIND_OF_PHASE: tuple[Kind, ...] = ("denoise", "verify", "commit")


class FluidReferenceStrategy:
    """Reference semantics: one canvas a round, at least one denoise forward and one commit each."""

    reads_prompt = True
    behind_prompt: tuple[int, ...] = ()

    def __init__(self, backbone: Backbone, head: KHead, mask_id: int, settings: FluidSettings) -> None:
        self.backbone = backbone
        self.head = head
        self.mask_id = mask_id
        self.settings = settings
        self.widest = settings.max_horizon

    def allocate(self, slots: int) -> None:
        device, widest = self.backbone.device, self.widest
        self._canvas = torch.full((slots, widest), self.mask_id, device=device)
        self._written = torch.zeros(slots, widest, dtype=torch.bool, device=device)
        self._first = torch.zeros(slots, dtype=torch.long, device=device)  # the prefix's own prediction, for slot 0
        self._pointer = torch.zeros(slots, dtype=torch.long, device=device)
        self._width = torch.zeros(slots, dtype=torch.long, device=device)
        self._phase = torch.zeros(slots, dtype=torch.long, device=device)
        self._host: list[tuple[int, int]] = [(DENOISE, 0)] * slots  # (phase, width), read back once a round

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        assert hidden is not None
        rows = torch.arange(start, start + len(hidden), device=hidden.device)
        self._open(rows, hidden[:, 0], self.backbone.logits(hidden[:, 0]).argmax(-1), rooms)
        strides = self._width[rows].tolist()
        self._host[start : start + len(strides)] = [(DENOISE, stride) for stride in strides]
        return Absorbed(tokens=[[] for _ in strides], keep=[0] * len(strides), predicted=strides)

    def plan(self, rows: int) -> Feed:
        phases, widths = zip(*self._host[:rows], strict=True)
        return Feed(
            ids=self._canvas[:rows, : max(widths)],
            widths=list(widths),
            kinds=[KIND_OF_PHASE[phase] for phase in phases],
        )

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows, fed = feed.ids.shape
        before = self._host[:rows]
        logits = self.backbone.logits(hidden)  # (n, S, V)
        surest, guess = logits.softmax(-1).max(-1)  # (n, S) each, emitted at slot j for slot j + 1
        predicted = torch.cat([self._first[:rows, None], guess[:, :-1]], dim=1)  # (n, S), for slot j
        phase = self._phase[:rows].clone()
        self._denoise(phase == DENOISE, surest, predicted)
        wrong = self._verify(phase == VERIFY, predicted)
        committed = [row for row, (was, _) in enumerate(before) if was == COMMIT]
        if committed:
            at = torch.tensor(committed, device=hidden.device)
            last = self._width[at] - 1
            left = [rooms[row] - before[row][1] for row in committed]
            self._open(at, hidden[at, last], guess[at, last], left)
        state = torch.cat([self._phase[:rows, None], self._width[:rows, None], wrong, self._canvas[:rows, :fed]], 1)
        return self._report(before, state.tolist())

    def move(self, source: int, target: int) -> None:
        for state in (self._canvas, self._written, self._first, self._pointer, self._width, self._phase):
            state[target] = state[source]
        self._host[target] = self._host[source]

    def _open(self, rows: Tensor, hidden: Tensor, first: Tensor, rooms: Sequence[int]) -> None:
        """Start a round: the K-head sets the stride, the canvas is all masks."""
        stride = self.head.stride(hidden).to(rows.device)
        stride = stride.clamp(self.settings.min_horizon, self.settings.max_horizon)
        self._width[rows] = torch.minimum(stride, torch.tensor(rooms, device=rows.device))
        self._first[rows] = first
        self._canvas[rows] = self.mask_id
        self._written[rows] = False
        self._pointer[rows] = 0
        self._phase[rows] = DENOISE

    def _denoise(self, active: Tensor, surest: Tensor, predicted: Tensor) -> None:
        """Write the pointer's slot and every later sure one; move the pointer past the unbroken sure run.

        active: (n,).  surest, predicted: (n, S); a slot's own confidence stands one slot to its left.
        """
        rows, fed = predicted.shape
        slot = torch.arange(fed, device=predicted.device)
        pointer, width = self._pointer[:rows, None], self._width[:rows, None]
        confidence = torch.cat([torch.zeros_like(surest[:, :1]), surest[:, :-1]], dim=1)
        sure = (confidence > self.settings.confidence) & (slot > pointer) & (slot < width)
        write = (sure | (slot == pointer)) & active[:, None]
        self._canvas[:rows, :fed] = torch.where(write, predicted, self._canvas[:rows, :fed])
        self._written[:rows, :fed] |= write
        reached = (sure | (slot <= pointer)).cumprod(1).sum(1)  # 1 + pointer + the sure run right after it
        self._pointer[:rows] = torch.where(active, reached, self._pointer[:rows])
        full = (self._written[:rows, :fed] | (slot >= width)).all(1) & active
        self._phase[:rows][full] = VERIFY if self.settings.verify else COMMIT

    def _verify(self, active: Tensor, predicted: Tensor) -> Tensor:
        """Keep the canvas up to the first token that differs from the causal argmax, which takes its place.

        Returns (n, 1) the draft it replaces, -1 where it replaces none.
        """
        rows, fed = predicted.shape
        slot = torch.arange(fed, device=predicted.device)
        canvas, width = self._canvas[:rows, :fed], self._width[:rows]
        agreed = ((canvas == predicted) & (slot < width[:, None])).cumprod(1).sum(1)  # (n,)
        fix = (slot == agreed[:, None]) & (slot < width[:, None]) & active[:, None]
        wrong = torch.where(fix, canvas, -1).amax(1, keepdim=True)
        self._canvas[:rows, :fed] = torch.where(fix, predicted, canvas)
        self._width[:rows] = torch.where(active, torch.minimum(agreed + 1, width), width)
        self._phase[:rows][active] = COMMIT
        return wrong

    def _report(self, before: list[tuple[int, int]], state: list[list[int]]) -> Absorbed:
        """Compare each row's phase with the one before this forward, on the host."""
        tokens: list[list[int]] = []
        keep: list[int] = []
        predicted: list[int | None] = []
        rejected = []
        for row, ((was, had), (phase, width, wrong, *canvas)) in enumerate(zip(before, state, strict=True)):
            decided = phase == COMMIT and was != COMMIT
            tokens.append(canvas[:width] if decided else [])
            rejected.append((width - 1, [wrong, *canvas[width:had]] if wrong >= 0 else []))
            keep.append(had if was == COMMIT else 0)
            predicted.append(width if was == COMMIT else None)
            self._host[row] = (phase, width)
        return Absorbed(tokens, keep, predicted, rejected=rejected)
