"""FLUID's published sampler, batched: K-head stride, confidence fill, causal verification.  (arXiv 2605.27387)

A step of a row drafts one canvas of masks, in several forwards of three phases:

    denoise   feed the canvas; write the slot at the pointer and each later slot above the confidence threshold; repeat
              until no mask is left
    verify    feed the full canvas; accept it up to the first token that is not the causal argmax, and correct that one
    commit    feed the accepted tokens, which caches them: after a correction, and where nothing is verified

The forward that caches a step's tokens commits them, and its last hidden state opens the next step: that is the
verification itself where it corrects nothing. Predictions are shifted by one, as in AR: slot j - 1 predicts slot j, and
the last committed token predicts slot 0.

    slot          0      1      2      3         stride 4, pointer at slot 1, threshold 0.9
    canvas        The    cat   [mask] [mask]
    prediction    The    cat    sat    on
    confidence     -     .95    .7     .93
    written              cat           on        the pointer moves to slot 2: slot 3 is written, but slot 2 is not

Each row is in its own phase; rows do not wait for one another.

Legend: n active rows, R rows just admitted, S slots fed, K widest stride, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.records import Kind, Request
from ..engine.strategy import NOTHING, Feed, RejectedDraft, RowUpdate, empty_updates
from ..forward.backbone import Backbone
from ..forward.khead import KHead
from ..settings import FluidSettings

DENOISE, VERIFY, COMMIT = range(3)
KIND_OF_PHASE: tuple[Kind, ...] = ("denoise", "verify", "commit")


class _CanvasStep(NamedTuple):
    """The host's copy of a row's step, read back once a forward.

    phase: of the next forward.  width: slots it feeds.  stride: as the K-head set it.
    rejected: draft tokens that verification threw out.
    """

    phase: int = DENOISE
    width: int = 0
    stride: int = 0
    rejected: tuple[int, ...] = ()


class FluidReferenceStrategy:
    """Reference semantics: one canvas a step, with one denoise forward at least and one that caches it."""

    prefills_prompt = True
    prompt_mask_block: tuple[int, ...] = ()
    draft_policy = None

    def __init__(self, backbone: Backbone, head: KHead, mask_id: int, settings: FluidSettings) -> None:
        self.backbone = backbone
        self.head = head
        self.mask_id = mask_id
        self.settings = settings
        self.max_slots = settings.max_horizon

    def allocate(self, rows: int) -> None:
        device, width = self.backbone.device, self.max_slots
        self._canvas = torch.full((rows, width), self.mask_id, device=device)
        self._first = torch.zeros(rows, dtype=torch.long, device=device)  # prediction for slot 0
        self._pointer = torch.zeros(rows, dtype=torch.long, device=device)
        self._width = torch.zeros(rows, dtype=torch.long, device=device)
        self._phase = torch.zeros(rows, dtype=torch.long, device=device)
        self._host = [_CanvasStep()] * rows

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> list[RowUpdate]:
        assert hidden is not None
        rows = list(range(start, start + len(hidden)))
        last = hidden[:, 0]  # (R, D)
        self._open(rows, last, self.backbone.logits(last).argmax(-1), window_left)
        return empty_updates(len(rows))

    def plan(self, rows: int) -> Feed:
        active = self._host[:rows]
        widths = [step.width for step in active]
        kinds = [KIND_OF_PHASE[step.phase] for step in active]
        return Feed(self._canvas[:rows, : max(widths)], widths, kinds)

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> list[RowUpdate]:
        rows, fed = feed.ids.shape
        logits = self.backbone.logits(hidden)  # (n, S, V)
        confidence, following = logits.softmax(-1).max(-1)  # (n, S) each, at slot j for slot j + 1
        predicted = torch.cat([self._first[:rows, None], following[:, :-1]], dim=1)  # (n, S), at the slot predicted
        phase = self._phase[:rows].clone()

        # 1) denoise
        self._denoise(phase == DENOISE, confidence, predicted)

        # 2) verify
        corrected = self._verify(phase == VERIFY, predicted)  # (n,)

        # 3) commit the steps whose tokens this forward has cached
        is_cached = (phase == COMMIT) | ((phase == VERIFY) & (corrected < 0))
        state = torch.stack([is_cached.long(), self._phase[:rows], self._width[:rows], corrected], 1)  # (n, 4)
        updates = self._read_back(torch.cat([state, self._canvas[:rows, :fed]], 1).tolist())

        # 4) open their next steps, from the hidden state of the last cached token
        done = [row for row, update in enumerate(updates) if update.cached]
        if done:
            last = [len(updates[row].cached) - 1 for row in done]
            left = [window_left[row] - len(updates[row].cached) for row in done]
            self._open(done, hidden[done, last], following[done, last], left)
        return updates

    def move(self, source: int, target: int) -> None:
        for state in (self._canvas, self._first, self._pointer, self._width, self._phase):
            state[target] = state[source]
        self._host[target] = self._host[source]

    def _open(self, rows: list[int], hidden: Tensor, first: Tensor, window_left: Sequence[int]) -> None:
        """Start a step: the K-head sets the stride, the canvas is all masks.

        hidden: (R, D) at the last committed token.  first: (R,) its prediction, for slot 0.
        """
        at = torch.tensor(rows, device=hidden.device)
        stride = self.head.stride(hidden).to(hidden.device)
        stride = stride.clamp(self.settings.min_horizon, self.settings.max_horizon)
        self._width[at] = torch.minimum(stride, torch.tensor(window_left, device=hidden.device))
        self._first[at] = first
        self._canvas[at] = self.mask_id
        self._pointer[at] = 0
        self._phase[at] = DENOISE
        for row, width in zip(rows, self._width[at].tolist(), strict=True):
            self._host[row] = _CanvasStep(width=width, stride=width)

    def _denoise(self, active: Tensor, confidence: Tensor, predicted: Tensor) -> None:
        """Write the pointer's slot and every later confident one; move the pointer past the unbroken confident run.

        active: (n,) rows in this phase.  confidence, predicted: (n, S); a slot's own confidence stands one slot to its
        left.
        """
        rows, fed = predicted.shape
        slot = torch.arange(fed, device=predicted.device)
        pointer, width = self._pointer[:rows, None], self._width[:rows, None]  # (n, 1) each
        # 1) write
        own_confidence = torch.cat([torch.zeros_like(confidence[:, :1]), confidence[:, :-1]], dim=1)  # (n, S)
        is_confident = (own_confidence > self.settings.confidence) & (slot > pointer) & (slot < width)
        is_written = (is_confident | (slot == pointer)) & active[:, None]
        self._canvas[:rows, :fed] = torch.where(is_written, predicted, self._canvas[:rows, :fed])
        # 2) move the pointer: the slots before it, its own, and the confident run right behind it
        reached = (is_confident | (slot <= pointer)).cumprod(1).sum(1)  # (n,)
        self._pointer[:rows] = torch.where(active, reached, self._pointer[:rows])
        # 3) next phase once no slot is a mask, or the pointer has passed all: the model may predict the mask token
        has_token = (self._canvas[:rows, :fed] != self.mask_id) | (slot >= width)
        is_full = has_token.all(1) | (reached >= width[:, 0])
        self._phase[:rows][is_full & active] = VERIFY if self.settings.verify else COMMIT

    def _verify(self, active: Tensor, predicted: Tensor) -> Tensor:
        """Accept the canvas up to the first token that is not the causal argmax, and put the argmax in its place.

        active: (n,) rows in this phase.  predicted: (n, S).  Returns (n,): the draft token replaced, -1 if none was.
        """
        rows, fed = predicted.shape
        slot = torch.arange(fed, device=predicted.device)
        canvas, width = self._canvas[:rows, :fed], self._width[:rows]
        is_inside = slot < width[:, None]  # (n, S)
        accepted = ((canvas == predicted) & is_inside).cumprod(1).sum(1)  # (n,) accepted length
        is_corrected = (slot == accepted[:, None]) & is_inside & active[:, None]  # (n, S), one slot a row at most
        corrected = torch.where(is_corrected, canvas, -1).amax(1)
        self._canvas[:rows, :fed] = torch.where(is_corrected, predicted, canvas)
        self._width[:rows] = torch.where(active, torch.minimum(accepted + 1, width), width)
        self._phase[:rows][active] = COMMIT
        return corrected

    def _read_back(self, state: list[list[int]]) -> list[RowUpdate]:
        """Update the host's copy after a forward, and commit the steps that are cached.

        state: of each row, whether its step is cached, phase, width, the draft token replaced or -1, and the canvas.
        """
        updates = []
        for row, (is_cached, phase, width, corrected, *canvas) in enumerate(state):
            before = self._host[row]
            rejected = before.rejected
            if corrected >= 0:  # the draft token in the corrected slot, and all behind it
                rejected = (corrected, *canvas[width : before.width])
            self._host[row] = _CanvasStep(phase, width, before.stride, rejected)
            if not is_cached:
                updates.append(RowUpdate([], [], NOTHING))
                continue
            age = 1 if before.phase == COMMIT else 0  # written by the forward before, where this one only caches
            draft = RejectedDraft(width - 1, list(rejected)) if rejected else None
            updates.append(RowUpdate(canvas[:width], [age] * width, range(width), before.stride, draft))
        return updates
