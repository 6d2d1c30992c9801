"""LLaDA's decoder, batched: prompt and canvas under full attention, nothing cached.  (arXiv 2502.09992)

The canvas of `gen_length` masks is filled block by block. Each step predicts masked slots where they stand and keeps
the n_t surest up to the end of the current block (linear schedule); the rest stays masked. A row is done when the block
with its first end token is full: later blocks cannot change what stands before.

Legend: n active rows, S slots fed (prompt and canvas), M open slots (masked, up to the block's end), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..forward import attention_masks
from ..forward.backbone import Backbone
from ..settings import LladaSettings


@dataclass
class _Canvas:
    """One row: its prompt's length, the ids of prompt and canvas, and how many slots each step of a block writes.

    passes: forwards so far.  when: for each slot the pass that wrote it.  unguided: (M, V) logits of this step without
    the prompt.  reported: tokens of the canvas that were handed out.
    """

    prompt: int
    ids: Tensor
    schedule: list[int]
    random: torch.Generator
    when: Tensor
    passes: int = 0
    block: int = 0
    step: int = 0
    unguided: Tensor | None = None
    reported: int = 0


def schedule(masked: int, steps: int) -> list[int]:
    """Slots to write at each of `steps` steps: masked // steps, the remainder to the first ones."""
    base, rest = divmod(masked, steps)
    return [base + (step < rest) for step in range(steps)]


class LladaStrategy:
    """Every forward feeds a row whole."""

    reads_prompt = False
    behind_prompt: tuple[int, ...] = ()
    draft_policy = None

    def __init__(
        self,
        backbone: Backbone,
        mask_id: int,
        eos_id: int | None,
        end_ids: tuple[int, ...],
        settings: LladaSettings,
    ) -> None:
        """eos_id: the tokenizer's end of sequence (LLaDA's EOS).  end_ids: all that end an answer (its EoT too)."""
        self.backbone, self.mask_id, self.settings = backbone, mask_id, settings
        self._eos = [] if eos_id is None else [eos_id]
        self._turn_ends = [token for token in end_ids if token != eos_id]
        self.widest = max(settings.block_length, settings.gen_length or 0)

    def allocate(self, slots: int) -> None:
        self._rows: list[_Canvas | None] = [None] * slots

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        for slot, (request, room) in enumerate(zip(requests, rooms, strict=True), start):
            self._rows[slot] = self._open(request, room)
        return Absorbed(tokens=[[] for _ in requests], keep=[0] * len(requests))

    def plan(self, rows: int) -> Feed:
        active = [self._row(slot) for slot in range(rows)]
        ids = [self._unguided(row) if self._asks_unguided(row) else row.ids for row in active]
        widths = [len(row) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.backbone.device)  # (n, S)
        intervals = attention_masks.bidirectional(torch.tensor(widths, device=padded.device), padded.shape[1])
        return Feed(padded, widths, ["denoise"] * rows, intervals)

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows = [self._row(slot) for slot in range(len(feed.widths))]
        for slot, row in enumerate(rows):
            open_ = self._open_slots(row)
            self._step(row, open_, self.backbone.logits(hidden[slot, open_.to(hidden.device)]))  # (M, V)
        fresh = [self._filled(row) for row in rows]
        tokens = [row.ids[part].tolist() for row, part in zip(rows, fresh, strict=True)]
        ago = [(row.passes - row.when[part]).tolist() for row, part in zip(rows, fresh, strict=True)]
        return Absorbed(tokens, keep=[0] * len(rows), full=[self._end(row) == len(row.ids) for row in rows], ago=ago)

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def _row(self, slot: int) -> _Canvas:
        row = self._rows[slot]
        assert row is not None
        return row

    def _open(self, request: Request, room: int) -> _Canvas:
        settings, prompt = self.settings, torch.tensor(request.prompt)
        length, steps = settings.canvas(request.max_new_tokens)
        if len(prompt) + length > room:
            raise ConfigError(
                f"request {request.key}: {len(prompt)} prompt tokens and a canvas of {length} exceed the window, {room}"
            )
        ids = torch.cat([prompt, torch.full((length,), self.mask_id)])
        random = torch.Generator().manual_seed(request.seed)
        return _Canvas(len(prompt), ids, schedule(settings.block_length, steps), random, torch.zeros_like(ids))

    def _asks_unguided(self, row: _Canvas) -> bool:
        return self.settings.guidance > 0 and row.unguided is None

    def _unguided(self, row: _Canvas) -> Tensor:
        """The row with its prompt masked, for classifier-free guidance."""
        ids = row.ids.clone()
        ids[: row.prompt] = self.mask_id
        return ids

    def _end(self, row: _Canvas) -> int:
        """Slots before the first of a block that is still to fill."""
        return row.prompt + row.block * self.settings.block_length

    def _open_slots(self, row: _Canvas) -> Tensor:
        """(M,) where a step may write: masks up to the current block's end.

        Masks may have been left before it, where a step predicted the mask itself, or stand in the prompt.
        """
        return (row.ids[: self._end(row) + self.settings.block_length] == self.mask_id).nonzero()[:, 0]

    def _step(self, row: _Canvas, open_: Tensor, logits: Tensor) -> None:
        """Write this step's slots. open_: (M,).  logits: (M, V)."""
        row.passes += 1
        if self._asks_unguided(row):
            row.unguided = logits
            return
        if row.unguided is not None:
            logits = row.unguided + (self.settings.guidance + 1) * (logits - row.unguided)
            row.unguided = None
        token, confidence = self._predict(row, logits)
        scores = torch.full(row.ids.shape, -torch.inf)  # of the whole row: of slots alike topk takes some by its length
        scores[open_] = confidence
        said = row.ids.index_put((open_,), token)
        write = scores.topk(row.schedule[row.step]).indices
        row.ids[write], row.when[write] = said[write], row.passes
        row.step += 1
        if row.step == len(row.schedule):
            row.block, row.step = row.block + 1, 0

    def _filled(self, row: _Canvas) -> slice:
        """What can be handed out: full blocks up to the first slot still a mask, the whole canvas at its end."""
        end = self._end(row)
        full = end == len(row.ids)
        left = (row.ids[row.prompt : end] == self.mask_id).nonzero()
        if self.settings.whole_canvas and not full:
            end = row.prompt
        elif len(left) and not full:
            end = row.prompt + int(left[0])
        fresh = slice(row.prompt + row.reported, end)
        row.reported = end - row.prompt
        return fresh

    def _predict(self, row: _Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token for every open slot and how sure it is. logits: (M, V).  On the host.

        As in the public code an end that is suppressed has its logit taken away: `logits_eos_inf` before the token is
        chosen, `suppress_end` after it, where the confidences are taken from, the other tokens' rising for it. Its
        EOS lies in the logits with noise, which are others at temperatures above 0, so it keeps its confidence there.
        """
        settings, logits = self.settings, logits.cpu()
        if settings.logits_eos_inf:
            logits = _without(logits, self._eos)
        token = gumbel(logits, settings.temperature, row.random).argmax(-1)
        if settings.remasking == "random":
            return token, torch.rand(len(token), generator=row.random)
        if settings.suppress_end:
            logits = _without(logits, self._turn_ends + (self._eos if settings.temperature == 0 else []))
        return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]


def _without(logits: Tensor, tokens: list[int]) -> Tensor:
    """Logits that leave these tokens no probability. (M, V)"""
    return logits.index_fill(-1, torch.tensor(tokens, dtype=torch.long), -torch.inf)


def gumbel(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """Logits with Gumbel noise in float64, whose argmax is a sample at this temperature. (slots, V)  (LLaDA)"""
    if temperature == 0:
        return logits
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=random).clamp(min=1e-300)
    return logits.double() - temperature * torch.log(-torch.log(noise))
