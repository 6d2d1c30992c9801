"""NBDiff's public decoder, batched: block after block, bidirectional inside the active one.  (arXiv 2512.06776)

Blocks count from the end of the prompt. The token before a block says its first one; inside, slot j is said at slot
j - 1. A block's small blocks are filled in turn: every pass writes the surest masked slot and all that pass the
threshold. A full block is fed once more under the causal mask, which caches its keys and opens the next block; for the
block an answer ends in that forward is not run, nothing would read it.

Legend: n active rows, R rows just admitted, S slots fed, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import masks
from ..backbone import Backbone
from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..settings import NbdiffSettings
from .sampling import choose


class NbdiffStrategy:
    """A row is either filling its block (both ways) or committing it (causally)."""

    reads_prompt = True
    behind_prompt: tuple[int, ...] = ()

    def __init__(self, backbone: Backbone, mask_id: int, block_length: int, settings: NbdiffSettings) -> None:
        self.backbone, self.mask_id, self.settings = backbone, mask_id, settings
        self.widest = block_length
        self.small = settings.part(block_length)

    def allocate(self, slots: int) -> None:
        device = self.backbone.device
        self._block = torch.full((slots, self.widest), self.mask_id, device=device)
        self._written = torch.zeros(slots, self.widest, dtype=torch.bool, device=device)
        self._ago = torch.zeros_like(self._block)  # passes since a slot was written
        self._width = torch.zeros(slots, dtype=torch.long, device=device)
        self._host: list[tuple[bool, int]] = [(False, 0)] * slots  # (full, width), read back once a round
        self._random = [torch.Generator() for _ in range(slots)]

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        assert hidden is not None
        for slot, request in enumerate(requests, start):
            self._random[slot] = torch.Generator().manual_seed(request.seed)
        rows = torch.arange(start, start + len(requests), device=hidden.device)
        self._open(rows, self.backbone.logits(hidden[:, 0]), rooms)
        return self._report(start, len(requests), [0] * len(requests))

    def plan(self, rows: int) -> Feed:
        full, widths = zip(*self._host[:rows], strict=True)
        ids = self._block[:rows, : max(widths)]
        both = torch.tensor([0 if done else width for done, width in self._host[:rows]], device=ids.device)
        return Feed(
            ids,
            widths=list(widths),
            kinds=["commit" if done else "denoise" for done in full],
            spans=masks.mutual(both, ids.shape[1]),
        )

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows = len(feed.ids)
        before = self._host[:rows]
        filling = [row for row, (full, _) in enumerate(before) if not full]
        committed = [row for row, (full, _) in enumerate(before) if full]
        if filling:
            at = torch.tensor(filling, device=hidden.device)
            self._fill(at, self.backbone.logits(hidden[at, :-1]))
        if committed:
            at = torch.tensor(committed, device=hidden.device)
            last = hidden[at, self._width[at] - 1]
            self._open(at, self.backbone.logits(last), [rooms[row] - before[row][1] for row in committed])
        return self._report(0, rows, [width if full else 0 for full, width in before])

    def move(self, source: int, target: int) -> None:
        for state in (self._block, self._written, self._ago, self._width):
            state[target] = state[source]
        self._host[target], self._random[target] = self._host[source], self._random[source]

    def _open(self, rows: Tensor, logits: Tensor, rooms: list[int]) -> None:
        """Start a block with its first token, said by the token before it. logits: (R, V)."""
        first, _ = self._choose(rows, logits[:, None])
        self._width[rows] = torch.tensor(rooms, device=rows.device).clamp(max=self.widest)
        self._block[rows] = self.mask_id
        self._written[rows] = False
        self._ago[rows] = 0
        self._block[rows, 0] = first[:, 0]
        self._written[rows, 0] = True

    def _fill(self, rows: Tensor, logits: Tensor) -> None:
        """Write the surest masked slot of each row's current small block, and all its slots that are sure enough.

        logits: (n, S - 1, V) at slots 0.., which say slots 1.. .
        """
        token, sureness = self._choose(rows, logits)
        reach = logits.shape[1] + 1
        slot = torch.arange(reach, device=rows.device)
        masked = ~self._written[rows, :reach] & (slot < self._width[rows, None])
        current = masked.int().argmax(-1, keepdim=True) // self.small  # (n, 1)
        masked &= slot // self.small == current
        score = sureness.masked_fill(~masked[:, 1:], -torch.inf)
        write = torch.zeros_like(masked)
        write[:, 1:] = score > self.settings.least_sureness
        write.scatter_(1, score.argmax(-1, keepdim=True) + 1, value=True)
        write &= masked
        said = torch.cat([self._block[rows, :1], token], 1)
        self._block[rows, :reach] = torch.where(write, said, self._block[rows, :reach])
        self._written[rows, :reach] |= write
        self._ago[rows, :reach] = (self._ago[rows, :reach] + 1).masked_fill(write, 0)

    def _choose(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and sureness for slots. logits: (n, S, V).  Returns (n, S) each."""
        settings, (n, slots, vocabulary) = self.settings, logits.shape
        draws = torch.zeros(n, slots)
        if settings.temperature > 0:
            wide = [torch.rand(self.widest, generator=self._random[row]) for row in rows.tolist()]  # whoever is beside
            draws = torch.stack(wide)[:, :slots]
        flat, how = draws.reshape(-1).to(logits.device), (settings.temperature, settings.top_p, settings.rule)
        token, sureness = choose(logits.reshape(-1, vocabulary), flat, *how)
        return token.reshape(n, slots), sureness.reshape(n, slots)

    def _report(self, start: int, count: int, keep: list[int]) -> Absorbed:
        """Blocks that have just become full are the answer's; read back once a round."""
        slot = torch.arange(self.widest, device=self._block.device)
        at = slice(start, start + count)
        full = (self._written[at] | (slot >= self._width[at, None])).all(1)
        state = torch.cat([full[:, None].long(), self._width[at, None], self._block[at], self._ago[at]], 1).tolist()
        tokens, ago = [], []
        for row, (done, width, *slots) in enumerate(state, start):
            tokens.append(slots[:width] if done else [])
            ago.append(slots[self.widest :][:width] if done else [])
            self._host[row] = (bool(done), width)
        return Absorbed(tokens, keep, ago=ago)
