"""Masked diffusion under full attention, batched, nothing cached: what `llada`, `mdlm` and `dream` share.

A row's canvas of masks is filled block by block. A step is one forward over prompt and canvas: it predicts every masked
slot up to the end of the current block, writes as many as the schedule says, those first that the selection rule
prefers, and leaves the rest masked. With classifier-free guidance a step is two forwards, the first of them with the
prompt masked. A row is done when the block with its first end token is full: later blocks cannot change the tokens
before them.

    prompt     Q : 6 * 7 ? |  canvas, blocks of 4, 4 steps a block
    step 1                 |  [m]  [m]  [m]  42      [m] [m] [m] [m]
    step 2                 |  The  [m]  [m]  42      [m] [m] [m] [m]

With `shift` the prediction for a slot is read from the slot before it, as next-token prediction has it: the logits move
right by one, as in Dream's public code (arXiv 2508.15487; DiffuLLaMA, arXiv 2410.17891).

Legend: n active rows, S slots fed (prompt and canvas), M open slots (masked, up to the block's end), V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..common.errors import ConfigError
from ..engine.records import Request
from ..engine.strategy import NOTHING, Feed, RowUpdate, empty_updates
from ..forward import attention_masks
from ..forward.backbone import predicting_slots
from ..scoring.monte_carlo import CanvasScorer
from ..settings import DecoderSettings
from ..settings.masked_diffusion import CanvasSettings


@dataclass
class CanvasState:
    """One row. ids: of prompt and canvas.  prompt: tokens of the prompt.  block_length: tokens of a block.
    steps: of a block.  schedule: what each step of the current block writes, as `CanvasStrategy._count` reads it.

    written_at: for each slot the forward that wrote it.  forwards: so far.  block, step: the current ones.
    unguided: (M, V) logits of this step without the prompt.  committed: tokens of the canvas that are in the answer.
    """

    prompt: int
    ids: Tensor
    block_length: int
    steps: int
    generator: torch.Generator
    written_at: Tensor
    schedule: Sequence[float] = ()
    forwards: int = 0
    block: int = 0
    step: int = 0
    unguided: Tensor | None = None
    committed: int = 0


class CanvasStrategy(ABC):
    """State of a row: its canvas. Every forward feeds prompt and canvas. A decoder says what a step writes."""

    prefills_prompt = False
    prompt_mask_block: tuple[int, ...] = ()
    draft_policy = None

    def __init__(self, checkpoint: Checkpoint, settings: CanvasSettings) -> None:
        assert checkpoint.mask_id is not None
        self.backbone, self.mask_id = checkpoint.backbone, checkpoint.mask_id
        self.shift = _shift(checkpoint, settings)
        self.max_slots = max(settings.block_length or 1, settings.gen_length or 0)
        self.settings = settings

    @abstractmethod
    def _schedule(self, state: CanvasState, masked: int) -> Sequence[float]:
        """What each step of a block writes. masked: tokens of the block."""

    def _count(self, state: CanvasState, masked: int) -> int:
        """Slots that this step writes. masked: M."""
        return int(state.schedule[state.step])

    @abstractmethod
    def _predict(self, state: CanvasState, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token and its confidence for every open slot, on the host. logits: (M, V) -> (M,) each.

        The most confident ones are written.
        """

    def allocate(self, rows: int) -> None:
        self._rows: list[CanvasState | None] = [None] * rows

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> list[RowUpdate]:
        for row, (request, left) in enumerate(zip(requests, window_left, strict=True), start):
            self._rows[row] = self._open(request, left)
        return empty_updates(len(requests))

    def plan(self, rows: int) -> Feed:
        ids = []
        for state in self._states(rows):
            ids.append(self._without_prompt(state) if self._needs_unguided(state) else state.ids)
        widths = list(map(len, ids))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.backbone.device)  # (n, S)
        intervals = attention_masks.bidirectional(torch.tensor(widths, device=padded.device), padded.shape[1])
        return Feed(padded, widths, ["denoise"] * rows, intervals)

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> list[RowUpdate]:
        updates = []
        for state, slots in zip(self._states(len(feed.widths)), hidden, strict=True):  # slots: (S, D)
            # 1) denoise
            open_ = self._open_slots(state)  # (M,)
            predicting = predicting_slots(open_, self.shift).to(slots.device)
            self._denoise(state, open_, self.backbone.logits(slots[predicting]))
            # 2) commit
            final = self._newly_final(state)
            tokens, ages = state.ids[final].tolist(), (state.forwards - state.written_at[final]).tolist()
            is_full = self._block_start(state) == len(state.ids)
            updates.append(RowUpdate(tokens, ages, NOTHING, is_full=is_full))
        return updates

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def _states(self, rows: int) -> list[CanvasState]:
        """Of rows 0..rows-1, which are all admitted."""
        return [state for state in self._rows[:rows] if state is not None]

    def _open(self, request: Request, left: int) -> CanvasState:
        """Lay a prompt and its canvas of masks out. left: positions of the context window."""
        settings, prompt = self.settings, torch.tensor(request.prompt)
        length, steps = settings.canvas(request.max_new_tokens)
        if len(prompt) + length > left:
            raise ConfigError(
                f"request {request.key}: {len(prompt)} prompt tokens and a canvas of {length} exceed the window, {left}"
            )
        ids = torch.cat([prompt, torch.full((length,), self.mask_id)])
        generator = torch.Generator().manual_seed(request.seed)
        block = settings.block_length or length
        state = CanvasState(len(prompt), ids, block, steps, generator, torch.zeros_like(ids))
        state.schedule = self._schedule(state, min(block, length))
        return state

    def _needs_unguided(self, state: CanvasState) -> bool:
        return self.settings.guidance > 0 and state.unguided is None

    def _without_prompt(self, state: CanvasState) -> Tensor:
        """The row with its prompt masked, for classifier-free guidance."""
        ids = state.ids.clone()
        ids[: state.prompt] = self.mask_id
        return ids

    def _block_start(self, state: CanvasState) -> int:
        """First slot of the current block; all blocks before it are full."""
        return min(state.prompt + state.block * state.block_length, len(state.ids))

    def _open_slots(self, state: CanvasState) -> Tensor:
        """(M,) slots that a step may write: masks up to the current block's end.

        Masks may be left before the block, where a step predicted the mask token, or stand in the prompt.
        """
        end = self._block_start(state) + state.block_length
        return (state.ids[:end] == self.mask_id).nonzero()[:, 0]

    def _denoise(self, state: CanvasState, open_: Tensor, logits: Tensor) -> None:
        """Write this step's slots. open_: (M,).  logits: (M, V)."""
        state.forwards += 1
        # 1) classifier-free guidance: keep the unguided logits for the next forward, which combines both
        if self._needs_unguided(state):
            state.unguided = logits
            return
        if state.unguided is not None:
            logits = state.unguided + (self.settings.guidance + 1) * (logits - state.unguided)
            state.unguided = None
        # 2) the most confident predictions, as many as the schedule says
        token, confidence = self._predict(state, logits)  # (M,) each
        scores = torch.full(state.ids.shape, -torch.inf)  # of the whole row, as there: topk breaks ties by length
        scores[open_] = confidence
        written = scores.topk(self._count(state, len(open_))).indices
        predicted = state.ids.index_put((open_,), token)
        state.ids[written], state.written_at[written] = predicted[written], state.forwards
        # 3) next step, next block
        state.step += 1
        if state.step == len(state.schedule) or not len(self._open_slots(state)):
            state.block, state.step = state.block + 1, 0
            left = len(state.ids) - self._block_start(state)
            state.schedule = self._schedule(state, min(state.block_length, left))

    def _newly_final(self, state: CanvasState) -> slice:
        """Slots that no later step changes and that are not committed: full blocks up to the first slot still masked,
        the whole canvas at its end.
        """
        end = self._block_start(state)
        is_full = end == len(state.ids)
        still_masked = (state.ids[state.prompt : end] == self.mask_id).nonzero()
        if self.settings.whole_canvas and not is_full:
            end = state.prompt
        elif len(still_masked) and not is_full:
            end = state.prompt + int(still_masked[0])
        final = slice(state.prompt + state.committed, end)
        state.committed = end - state.prompt
        return final


def gumbel(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Logits with Gumbel noise in float64, whose argmax is a sample at this temperature. (M, V)  (LLaDA)"""
    if temperature == 0:
        return logits
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator).clamp(min=1e-300)
    return logits.double() - temperature * torch.log(-torch.log(noise))


def open_scorer(checkpoint: Checkpoint, settings: DecoderSettings, batch_size: int) -> CanvasScorer:
    """Monte-Carlo log-likelihoods. A decoder without a canvas's settings has their defaults."""
    assert checkpoint.mask_id is not None
    own = settings if isinstance(settings, CanvasSettings) else CanvasSettings()
    return CanvasScorer(checkpoint.backbone, checkpoint.mask_id, batch_size, own.mc_num, shift=_shift(checkpoint, own))


def _shift(checkpoint: Checkpoint, settings: CanvasSettings) -> bool:
    return settings.shift_for(trained=checkpoint.manifest is not None and checkpoint.manifest.shift)
