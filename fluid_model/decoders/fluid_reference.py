"""FLUID's public sampler, batched: K-head stride, confidence fill, causal verification.  (arXiv 2605.27387)

Each row runs its own rounds of up to three phases, so rows never wait for or read one another:
    denoise   feed the canvas; write the pointer's slot and every later slot that is sure; until none is a mask
    verify    feed the filled canvas; keep it up to the first token greedy AR would not have written, corrected
    commit    feed what was kept, to cache its keys: after a correction, and where nothing is verified
The forward that caches a round's tokens closes it: its last hidden state opens the next round. After a verification
without a mismatch that is the verification itself. The prediction for canvas slot j is emitted at slot j - 1 (the
next-token shift), slot 0's by the prefix. A round is closed before its tokens are looked at, the answer's last as well.

Legend: n active rows, R rows just admitted, S slots fed, K widest stride, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.records import Kind, Request
from ..engine.strategy import Absorbed, Feed
from ..forward.backbone import Backbone
from ..forward.khead import KHead
from ..settings import FluidSettings

DENOISE, VERIFY, COMMIT = range(3)
KIND_OF_PHASE: tuple[Kind, ...] = ("denoise", "verify", "commit")


class _Round(NamedTuple):
    """A row's round as the host knows it.

    phase: of the next forward.  width: slots it feeds.  stride: the canvas as the K-head set it.
    rejected: draft tokens that verification threw out.
    """

    phase: int = DENOISE
    width: int = 0
    stride: int = 0
    rejected: tuple[int, ...] = ()


class FluidReferenceStrategy:
    """Reference semantics: one canvas a round, which takes at least one denoise forward and one that caches it."""

    reads_prompt = True
    behind_prompt: tuple[int, ...] = ()
    draft_policy = None

    def __init__(self, backbone: Backbone, head: KHead, mask_id: int, settings: FluidSettings) -> None:
        self.backbone = backbone
        self.head = head
        self.mask_id = mask_id
        self.settings = settings
        self.widest = settings.max_horizon

    def allocate(self, slots: int) -> None:
        device, widest = self.backbone.device, self.widest
        self._canvas = torch.full((slots, widest), self.mask_id, device=device)
        self._first = torch.zeros(slots, dtype=torch.long, device=device)  # the prefix's own prediction, for slot 0
        self._pointer = torch.zeros(slots, dtype=torch.long, device=device)
        self._width = torch.zeros(slots, dtype=torch.long, device=device)
        self._phase = torch.zeros(slots, dtype=torch.long, device=device)
        self._host = [_Round()] * slots  # read back once a forward

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        assert hidden is not None
        rows = list(range(start, start + len(hidden)))
        self._open(rows, hidden[:, 0], self.backbone.logits(hidden[:, 0]).argmax(-1), rooms)
        return Absorbed(tokens=[[] for _ in rows], keep=[0] * len(rows))

    def plan(self, rows: int) -> Feed:
        active = self._host[:rows]
        widths = [row.width for row in active]
        kinds = [KIND_OF_PHASE[row.phase] for row in active]
        return Feed(ids=self._canvas[:rows, : max(widths)], widths=widths, kinds=kinds)

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows, fed = feed.ids.shape
        logits = self.backbone.logits(hidden)  # (n, S, V)
        surest, guess = logits.softmax(-1).max(-1)  # (n, S) each, emitted at slot j for slot j + 1
        predicted = torch.cat([self._first[:rows, None], guess[:, :-1]], dim=1)  # (n, S), for slot j
        phase = self._phase[:rows].clone()
        # 1) denoise, 2) verify
        self._denoise(phase == DENOISE, surest, predicted)
        wrong = self._verify(phase == VERIFY, predicted)
        # 3) close the rounds whose tokens this forward has cached, open the next ones
        cached = (phase == COMMIT) | ((phase == VERIFY) & (wrong < 0))
        state = torch.stack([cached.long(), self._phase[:rows], self._width[:rows], wrong], 1)
        absorbed = self._report(torch.cat([state, self._canvas[:rows, :fed]], 1).tolist())
        closed = [row for row, keep in enumerate(absorbed.keep) if keep]
        if closed:
            last = [absorbed.keep[row] - 1 for row in closed]
            left = [rooms[row] - absorbed.keep[row] for row in closed]
            self._open(closed, hidden[closed, last], guess[closed, last], left)
        return absorbed

    def move(self, source: int, target: int) -> None:
        for state in (self._canvas, self._first, self._pointer, self._width, self._phase):
            state[target] = state[source]
        self._host[target] = self._host[source]

    def _open(self, rows: list[int], hidden: Tensor, first: Tensor, rooms: Sequence[int]) -> None:
        """Start a round: the K-head sets the stride, the canvas is all masks."""
        at = torch.tensor(rows, device=hidden.device)
        stride = self.head.stride(hidden).to(hidden.device)
        stride = stride.clamp(self.settings.min_horizon, self.settings.max_horizon)
        self._width[at] = torch.minimum(stride, torch.tensor(rooms, device=hidden.device))
        self._first[at] = first
        self._canvas[at] = self.mask_id
        self._pointer[at] = 0
        self._phase[at] = DENOISE
        for row, width in zip(rows, self._width[at].tolist(), strict=True):
            self._host[row] = _Round(width=width, stride=width)

    def _denoise(self, active: Tensor, surest: Tensor, predicted: Tensor) -> None:
        """Write the pointer's slot and every later sure one; move the pointer past the unbroken sure run.

        The canvas is filled when no slot is a mask, or the pointer has passed them all: a mask may be what the model
        predicts.  active: (n,).  surest, predicted: (n, S); a slot's own confidence stands one slot to its left.
        """
        rows, fed = predicted.shape
        slot = torch.arange(fed, device=predicted.device)
        pointer, width = self._pointer[:rows, None], self._width[:rows, None]
        confidence = torch.cat([torch.zeros_like(surest[:, :1]), surest[:, :-1]], dim=1)
        sure = (confidence > self.settings.confidence) & (slot > pointer) & (slot < width)
        write = (sure | (slot == pointer)) & active[:, None]
        self._canvas[:rows, :fed] = torch.where(write, predicted, self._canvas[:rows, :fed])
        reached = (sure | (slot <= pointer)).cumprod(1).sum(1)  # 1 + pointer + the sure run right after it
        self._pointer[:rows] = torch.where(active, reached, self._pointer[:rows])
        filled = ((self._canvas[:rows, :fed] != self.mask_id) | (slot >= width)).all(1) | (reached >= width[:, 0])
        self._phase[:rows][filled & active] = VERIFY if self.settings.verify else COMMIT

    def _verify(self, active: Tensor, predicted: Tensor) -> Tensor:
        """Keep the canvas up to the first token that differs from the causal argmax, which takes its place.

        Returns (n,) the draft token it replaces, -1 where it replaces none.
        """
        rows, fed = predicted.shape
        slot = torch.arange(fed, device=predicted.device)
        canvas, width = self._canvas[:rows, :fed], self._width[:rows]
        agreed = ((canvas == predicted) & (slot < width[:, None])).cumprod(1).sum(1)  # (n,)
        fix = (slot == agreed[:, None]) & (slot < width[:, None]) & active[:, None]
        wrong = torch.where(fix, canvas, -1).amax(1)
        self._canvas[:rows, :fed] = torch.where(fix, predicted, canvas)
        self._width[:rows] = torch.where(active, torch.minimum(agreed + 1, width), width)
        self._phase[:rows][active] = COMMIT
        return wrong

    def _report(self, state: list[list[int]]) -> Absorbed:
        """Take over what a forward changed, and hand out the tokens of the rounds it closed.

        state: of each row whether its tokens are cached now, phase, width, the draft token that was replaced, canvas.
        """
        absorbed = Absorbed(tokens=[], keep=[])
        for row, (cached, phase, width, wrong, *canvas) in enumerate(state):
            before = self._host[row]
            rejected = (wrong, *canvas[width : before.width]) if wrong >= 0 else before.rejected
            self._host[row] = _Round(phase, width, before.stride, rejected)
            absorbed.tokens.append(canvas[:width] if cached else [])
            absorbed.keep.append(width if cached else 0)
            absorbed.predicted.append(before.stride if cached else None)
            absorbed.ago.append([int(before.phase == COMMIT)] * width if cached else [])
            absorbed.rejected.append((width - 1, list(rejected) if cached else []))
        return absorbed
