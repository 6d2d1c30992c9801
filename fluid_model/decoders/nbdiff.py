"""NBDiff's public decoder, batched: block after block, bidirectional inside the active one.  (arXiv 2512.06776)

Blocks count from the end of the prompt. The token before a block predicts its first one; inside, slot j is predicted at
slot j - 1. A block's small blocks are filled in turn: every pass writes the surest masked slot and all that pass the
threshold. After each of them the end of the answer is looked for, and nothing more is fed once it is there. A full
block without an end is fed once more under the causal mask, which caches its keys, hands its tokens out and opens the
next.

Legend: n active rows, R rows just admitted, S slots fed, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..forward import attention_masks
from ..forward.backbone import Backbone
from ..settings import NbdiffSettings
from .sampling import choose


class NbdiffStrategy:
    """A row is either filling its block (both ways) or committing it (causally)."""

    reads_prompt = True
    behind_prompt: tuple[int, ...] = ()
    draft_policy = None

    def __init__(
        self, backbone: Backbone, mask_id: int, end_ids: tuple[int, ...], block_length: int, settings: NbdiffSettings
    ) -> None:
        self.backbone, self.mask_id, self.end_ids, self.settings = backbone, mask_id, frozenset(end_ids), settings
        self.widest = block_length
        self.small = settings.small_block_length(block_length)

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
        absorbed = Absorbed(tokens=[[] for _ in requests], keep=[0] * len(requests), ago=[[] for _ in requests])
        self._look(start, absorbed)
        return absorbed

    def plan(self, rows: int) -> Feed:
        full, widths = zip(*self._host[:rows], strict=True)
        ids = self._block[:rows, : max(widths)]
        both = torch.tensor([0 if done else width for done, width in self._host[:rows]], device=ids.device)
        return Feed(
            ids,
            widths=list(widths),
            kinds=["commit" if done else "denoise" for done in full],
            intervals=attention_masks.bidirectional(both, ids.shape[1]),
        )

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows, before = len(feed.ids), self._host[: len(feed.ids)]
        committed, filling = ([row for row in range(rows) if before[row][0] == full] for full in (True, False))
        absorbed = Absorbed(tokens=[[] for _ in before], keep=[0] * rows, ago=[[] for _ in before])
        # 1) fill blocks
        if filling:
            at = torch.tensor(filling, device=hidden.device)
            fed = hidden[at]
            self._fill(at, self.backbone.logits(torch.cat([fed[:, :1], fed[:, :-1]], 1)))
        # 2) hand out those that are cached now, and open the next
        if committed:
            at = torch.tensor(committed, device=hidden.device)
            for row, tokens, ago in zip(committed, self._block[at].tolist(), self._ago[at].tolist(), strict=True):
                width = absorbed.keep[row] = before[row][1]
                absorbed.tokens[row] += tokens[:width]
                absorbed.ago[row] += [passes + 1 for passes in ago[:width]]
            last = hidden[at, self._width[at] - 1]
            self._open(at, self.backbone.logits(last), [rooms[row] - absorbed.keep[row] for row in committed])
        # 3) look for the end
        self._look(0, absorbed)
        return absorbed

    def move(self, source: int, target: int) -> None:
        for state in (self._block, self._written, self._ago, self._width):
            state[target] = state[source]
        self._host[target], self._random[target] = self._host[source], self._random[source]

    def _open(self, rows: Tensor, logits: Tensor, rooms: list[int]) -> None:
        """Start a block with its first token, predicted by the token before it. logits: (R, V)."""
        first, _ = self._choose(rows, logits[:, None])
        self._width[rows] = torch.tensor(rooms, device=rows.device).clamp(max=self.widest)
        self._block[rows] = self.mask_id
        self._written[rows] = False
        self._ago[rows] = 0
        self._block[rows, 0] = first[:, 0]
        self._written[rows, 0] = first[:, 0] != self.mask_id

    def _fill(self, rows: Tensor, logits: Tensor) -> None:
        """Write the surest masked slot of each row's current small block, and all its slots that are sure enough.

        A slot whose token is the mask itself stays open, unless the pass wrote nothing else: the public code would
        not end there.  logits: (n, S, V), each at the slot it predicts; slot 0, where the token before the block
        predicted a mask, predicts itself.
        """
        token, sureness = self._choose(rows, logits)
        reach = logits.shape[1]
        slot = torch.arange(reach, device=rows.device)
        masked = ~self._written[rows, :reach] & (slot < self._width[rows, None])
        current = masked.int().argmax(-1, keepdim=True) // self.small  # (n, 1)
        masked &= slot // self.small == current
        score = sureness.masked_fill(~masked, -torch.inf)
        write = score > self.settings.confidence_threshold
        write.scatter_(1, score.argmax(-1, keepdim=True), value=True)
        write &= masked
        real = write & (token != self.mask_id)
        write = torch.where(real.any(-1, keepdim=True), real, write)
        self._block[rows, :reach] = torch.where(write, token, self._block[rows, :reach])
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

    def _look(self, start: int, absorbed: Absorbed) -> None:
        """Hand out blocks that hold an end in a small block that is full; the host hears how rows go on.

        absorbed: of rows start.., gets the tokens.
        """
        slot = torch.arange(self.widest, device=self._block.device)
        at = slice(start, start + len(absorbed.tokens))
        filled = (self._written[at] | (slot >= self._width[at, None])).cumprod(1).sum(1)  # slots before the first mask
        state = torch.cat([filled[:, None], self._width[at, None], self._block[at], self._ago[at]], 1).tolist()
        for number, (reached, width, *slots) in enumerate(state):
            full = reached >= width
            done = width if full else reached // self.small * self.small
            if not self.end_ids.isdisjoint(slots[:done]):
                absorbed.tokens[number] += slots[:done]
                absorbed.ago[number] += slots[self.widest :][:done]
            self._host[start + number] = (full, width)
