"""NBDiff's public decoder, batched: block diffusion over an AR model, block after block.  (arXiv 2512.06776)

A row's step is one block of masks behind its cached tokens, in several forwards of two phases:

    denoise   feed the block under bidirectional attention within it (context-causal mask); write the most confident
              masked slot of the current small block, and all of its slots above the threshold
    commit    feed the full block under causal attention, which caches it; its last slot opens the next block

A block is cut into small blocks, which are filled in turn. An end token in a complete small block ends the answer, and
that block is not cached any more. Predictions are shifted by one, as in AR: slot j - 1 predicts slot j, and the token
before the block predicts slot 0.

    block of 8, small blocks of 4:   17  -  6  [mask] | [mask] [mask] [mask] [mask]
    next denoise forward writes                  ^ the only slot left of the current small block

Legend: n active rows, R rows just admitted, S slots fed, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..engine.records import Kind, Request
from ..engine.strategy import Feed, RowUpdate, empty_updates
from ..forward import attention_masks
from ..forward.backbone import Backbone
from ..settings import NbdiffSettings
from .sampling import choose


class _Block(NamedTuple):
    """The host's copy of a row's block, read back once a forward. width: slots inside the window."""

    is_full: bool = False
    width: int = 0


class NbdiffStrategy:
    """State of a row: its block, filled under bidirectional attention or committed under causal attention."""

    prefills_prompt = True
    prompt_mask_block: tuple[int, ...] = ()
    draft_policy = None

    def __init__(
        self, backbone: Backbone, mask_id: int, end_ids: tuple[int, ...], block_length: int, settings: NbdiffSettings
    ) -> None:
        self.backbone, self.mask_id, self.end_ids, self.settings = backbone, mask_id, frozenset(end_ids), settings
        self.max_slots = block_length
        self.small_block = settings.small_block_length(block_length)

    def allocate(self, rows: int) -> None:
        device = self.backbone.device
        self._block = torch.full((rows, self.max_slots), self.mask_id, device=device)
        self._is_written = torch.zeros(rows, self.max_slots, dtype=torch.bool, device=device)
        self._ages = torch.zeros_like(self._block)  # denoise forwards since a slot was written
        self._width = torch.zeros(rows, dtype=torch.long, device=device)
        self._host = [_Block()] * rows
        self._generators = [torch.Generator() for _ in range(rows)]

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> list[RowUpdate]:
        assert hidden is not None
        for row, request in enumerate(requests, start):
            self._generators[row] = torch.Generator().manual_seed(request.seed)
        rows = torch.arange(start, start + len(requests), device=hidden.device)
        self._open(rows, self.backbone.logits(hidden[:, 0]), window_left)
        updates = empty_updates(len(requests))
        self._read_back(start, updates)
        return updates

    def plan(self, rows: int) -> Feed:
        widths, kinds, bidirectional = list[int](), list[Kind](), list[int]()
        for block in self._host[:rows]:
            widths.append(block.width)
            kinds.append("commit" if block.is_full else "denoise")
            bidirectional.append(0 if block.is_full else block.width)  # a commit is causal
        ids = self._block[:rows, : max(widths)]  # (n, S)
        intervals = attention_masks.bidirectional(torch.tensor(bidirectional, device=ids.device), ids.shape[1])
        return Feed(ids, widths, kinds, intervals)

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> list[RowUpdate]:
        denoised, committed = list[int](), list[int]()
        for row, kind in enumerate(feed.kinds):
            (committed if kind == "commit" else denoised).append(row)
        updates = empty_updates(len(feed.kinds))
        # 1) denoise
        if denoised:
            at = torch.tensor(denoised, device=hidden.device)
            states = hidden[at]
            shifted = torch.cat([states[:, :1], states[:, :-1]], 1)  # (n, S, D), at the slot predicted
            self._fill(at, self.backbone.logits(shifted))
        # 2) commit, and open the next block from the last slot
        if committed:
            at = torch.tensor(committed, device=hidden.device)
            for row, tokens, ages in zip(committed, self._block[at].tolist(), self._ages[at].tolist(), strict=True):
                width = feed.widths[row]
                since_commit = [age + 1 for age in ages[:width]]  # this forward is one more
                updates[row] = RowUpdate(tokens[:width], since_commit, range(width))
            last = hidden[at, self._width[at] - 1]  # (R, D)
            self._open(at, self.backbone.logits(last), [window_left[row] - feed.widths[row] for row in committed])
        # 3) commit blocks that hold the answer's end
        self._read_back(0, updates)
        return updates

    def move(self, source: int, target: int) -> None:
        for state in (self._block, self._is_written, self._ages, self._width):
            state[target] = state[source]
        self._host[target], self._generators[target] = self._host[source], self._generators[source]

    def _open(self, rows: Tensor, logits: Tensor, window_left: list[int]) -> None:
        """Start a block with its first token. logits: (R, V), at the token before the block."""
        first, _ = self._choose(rows, logits[:, None])  # (R, 1)
        self._width[rows] = torch.tensor(window_left, device=rows.device).clamp(max=self.max_slots)
        self._block[rows] = self.mask_id
        self._is_written[rows] = False
        self._ages[rows] = 0
        self._block[rows, 0] = first[:, 0]
        self._is_written[rows, 0] = first[:, 0] != self.mask_id

    def _fill(self, rows: Tensor, logits: Tensor) -> None:
        """Write the most confident masked slot of each current small block, and all its slots above the threshold.

        A slot that predicts the mask token stays open, unless the pass wrote nothing else: the public code would not
        end there.  logits: (n, S, V), each at the slot predicted; slot 0, where the token before the block predicted a
        mask, predicts itself.
        """
        token, confidence = self._choose(rows, logits)  # (n, S) each
        reach = logits.shape[1]
        slot = torch.arange(reach, device=rows.device)
        # 1) the masked slots of the small block that holds the first masked slot
        is_masked = ~self._is_written[rows, :reach] & (slot < self._width[rows, None])  # (n, S)
        current = is_masked.int().argmax(-1, keepdim=True) // self.small_block  # (n, 1)
        is_open = is_masked & (slot // self.small_block == current)
        # 2) the most confident of them, and those above the threshold
        score = confidence.masked_fill(~is_open, -torch.inf)
        is_chosen = score > self.settings.confidence_threshold
        is_chosen.scatter_(1, score.argmax(-1, keepdim=True), value=True)
        is_chosen &= is_open
        # 3) without those that predict the mask token, unless there are no others
        is_token = is_chosen & (token != self.mask_id)
        writes = torch.where(is_token.any(-1, keepdim=True), is_token, is_chosen)
        # 4) write
        self._block[rows, :reach] = torch.where(writes, token, self._block[rows, :reach])
        self._is_written[rows, :reach] |= writes
        self._ages[rows, :reach] = (self._ages[rows, :reach] + 1).masked_fill(writes, 0)

    def _choose(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token and a confidence for every slot. logits: (n, S, V).  Returns (n, S) each."""
        settings, (n, slots, vocabulary) = self.settings, logits.shape
        draws = torch.zeros(n, slots)
        if settings.temperature > 0:
            # A row draws for its widest block, so that its numbers do not depend on how wide the batch is.
            numbers = [torch.rand(self.max_slots, generator=self._generators[row]) for row in rows.tolist()]
            draws = torch.stack(numbers)[:, :slots]
        flat_logits, flat_draws = logits.reshape(-1, vocabulary), draws.reshape(-1).to(logits.device)
        token, confidence = choose(flat_logits, flat_draws, settings.temperature, settings.top_p, settings.rule)
        return token.reshape(n, slots), confidence.reshape(n, slots)

    def _read_back(self, start: int, updates: list[RowUpdate]) -> None:
        """Update the host's copy of rows start.., and commit what stands before a mask where it holds an end token.

        Only complete small blocks count: their tokens are final. `updates` of rows start.. get the tokens.
        """
        slot = torch.arange(self.max_slots, device=self._block.device)
        rows = slice(start, start + len(updates))
        is_done = self._is_written[rows] | (slot >= self._width[rows, None])
        filled = is_done.cumprod(1).sum(1)  # (n,) slots before the first mask
        state = torch.cat([filled[:, None], self._width[rows, None], self._block[rows], self._ages[rows]], 1)
        for number, (reached, width, *slots) in enumerate(state.tolist()):
            tokens, ages = slots[: self.max_slots], slots[self.max_slots :]
            is_full = reached >= width
            final = width if is_full else reached // self.small_block * self.small_block
            if not self.end_ids.isdisjoint(tokens[:final]):
                updates[number].tokens.extend(tokens[:final])
                updates[number].ages.extend(ages[:final])
            self._host[start + number] = _Block(is_full, width)


def open_strategy(checkpoint: Checkpoint, settings: NbdiffSettings) -> NbdiffStrategy:
    """The strategy of these settings, with the checkpoint's block length."""
    assert checkpoint.mask_id is not None
    length = settings.block_length_for(checkpoint.manifest.block_length if checkpoint.manifest else None)
    return NbdiffStrategy(checkpoint.backbone, checkpoint.mask_id, checkpoint.end_ids, length, settings)
