"""LLaDA's decoder, batched: prompt and canvas under full attention, nothing cached.  (arXiv 2502.09992)

The canvas of `gen_length` masks is filled block by block. Each step predicts masked slots where they stand and keeps
the n_t surest of the current block (linear schedule); the rest stays masked. A row is done when the block with its
first end token is full: later blocks cannot change what stands before.

Legend: n active rows, S slots fed (prompt and canvas), G canvas slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import masks
from ..backbone import Backbone
from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..errors import ConfigError
from ..settings import LladaSettings


@dataclass
class _Canvas:
    """One row: its prompt's length, the ids of prompt and canvas, and how many slots each step of a block writes.

    passes: forwards so far.  when: for each canvas slot the pass that wrote it.
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


def schedule(masked: int, steps: int) -> list[int]:
    """Slots to write at each of `steps` steps: masked // steps, the remainder to the first ones."""
    base, rest = divmod(masked, steps)
    return [base + (step < rest) for step in range(steps)]


class LladaStrategy:
    """Every forward feeds a row whole."""

    reads_prompt = False
    behind_prompt: tuple[int, ...] = ()

    def __init__(self, backbone: Backbone, mask_id: int, end_ids: tuple[int, ...], settings: LladaSettings) -> None:
        self.backbone, self.mask_id, self.end_ids, self.settings = backbone, mask_id, end_ids, settings
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
        spans = masks.mutual(torch.tensor(widths, device=padded.device), padded.shape[1])
        return Feed(padded, widths, ["denoise"] * rows, spans)

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        done = []
        for slot, width in enumerate(feed.widths):
            row = self._row(slot)
            logits = self.backbone.logits(hidden[slot, row.prompt : width])  # (G, V)
            done.append(self._step(row, logits))
        rows = [self._row(slot) for slot in range(len(done))]
        full = [row.block * self.settings.block_length >= len(row.ids) - row.prompt for row in rows]
        tokens = [row.ids[row.prompt :][block].tolist() for row, block in zip(rows, done, strict=True)]
        ago = [(row.passes - row.when[block]).tolist() for row, block in zip(rows, done, strict=True)]
        return Absorbed(tokens, keep=[0] * len(done), full=full, ago=ago)

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
        canvas = torch.full((length,), self.mask_id)
        random = torch.Generator().manual_seed(request.seed)
        writes = schedule(settings.block_length, steps)
        return _Canvas(len(prompt), torch.cat([prompt, canvas]), writes, random, torch.zeros_like(canvas))

    def _asks_unguided(self, row: _Canvas) -> bool:
        return self.settings.guidance > 0 and row.unguided is None

    def _unguided(self, row: _Canvas) -> Tensor:
        """The row with its prompt masked, for classifier-free guidance."""
        ids = row.ids.clone()
        ids[: row.prompt] = self.mask_id
        return ids

    def _step(self, row: _Canvas, logits: Tensor) -> slice:
        """Write this step's slots; returns where in the canvas a block has become full. logits: (G, V)."""
        settings, nowhere = self.settings, slice(0)
        row.passes += 1
        if self._asks_unguided(row):
            row.unguided = logits
            return nowhere
        if row.unguided is not None:
            logits = row.unguided + (settings.guidance + 1) * (logits - row.unguided)
            row.unguided = None
        canvas = row.ids[row.prompt :]
        low = row.block * settings.block_length
        high = min(low + settings.block_length, len(canvas))
        token, sureness = self._predict(row, logits[low:high])
        open_ = canvas[low:high] == self.mask_id
        write = sureness.masked_fill(~open_, -torch.inf).topk(min(row.schedule[row.step], int(open_.sum()))).indices
        canvas[low + write], row.when[low + write] = token[write], row.passes
        row.step += 1
        if row.step < len(row.schedule):
            return nowhere
        row.block, row.step = row.block + 1, 0
        return slice(low, high)

    def _predict(self, row: _Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token for every slot of the block and how sure it is. logits: (slots, V).  On the host."""
        settings, logits = self.settings, logits.cpu()
        token = gumbel(logits, settings.temperature, row.random).argmax(-1)
        if settings.remasking == "random":
            sureness = torch.rand(len(token), generator=row.random)
        else:
            sureness = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
        if settings.suppress_end:
            sureness = sureness.masked_fill(torch.isin(token, torch.tensor(self.end_ids)), -1.0)
        return token, sureness


def gumbel(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """Logits with Gumbel noise in float64, whose argmax is a sample at this temperature. (slots, V)  (LLaDA)"""
    if temperature == 0:
        return logits
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=random).clamp(min=1e-300)
    return logits.double() - temperature * torch.log(-torch.log(noise))
