"""Block diffusion, batched: NBDiff's public decoder (arXiv 2512.06776), dLLM's BD3LM (BD3-LMs, arXiv 2503.09573), SDAR
(arXiv 2510.06303) and Fast-dLLM v2 (arXiv 2509.26328). `settings.block_diffusion` names what differs.

A row's step is one block of masks behind its cached tokens, in several forwards of two phases:

    denoise   feed the block under bidirectional attention within it; write some of its masked slots
    commit    feed the full block once more, which caches it; its last slot opens the next block where predictions are
              shifted.  Attention is causal (NBDiff), or as before (block-causal context)

A block may be cut into small blocks, which are filled in turn. Shifted, as in AR, slot j - 1 predicts slot j, and the
token before the block predicts slot 0; else a masked slot predicts its own token.

    NBDiff, block of 8, small blocks of 4:   17  -  6  [mask] | [mask] [mask] [mask] [mask]
    next denoise forward writes                          ^ the only slot left of the current small block

Where blocks count from the prompt's start, the first one opens with the prompt's last tokens, which are given.

With a block cache, a small block whose first token is written is fed alone. The block's other slots then stand before
it in the KV cache, for as long as it is being filled. Order in the cache is not order in the text, positions are:

    columns   prompt | 0 1 2 3 | 4 5 6 7        a denoise forward of the whole block, small blocks of 4
              prompt | 4 5 6 7 | 0 1 2 3        the next ones feed slots 0 to 3 behind slots 4 to 7 as those were

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
from ..forward.attention_masks import PromptBlocks
from ..forward.backbone import Backbone
from ..settings.block_diffusion import BlockDiffusionSettings
from . import transfer_schedule
from .sampling import choose

LEAST_PROBABILITY = 1e-12
"""Of a token, in the entropy of entropy-bounded selection.  (JetEngine, SDAR's engine)"""


class _Block(NamedTuple):
    """The host's copy of a row's block, read back once a forward.

    width: slots inside the window, and the length limit where that ends blocks.  given: of them, the prompt's tokens.
    left: tokens that the answer may still grow by.  step: denoise forwards so far.
    filled: slots before the first mask.  fed: slots of the next forward.  others: other slots that it reads cached.
    """

    is_full: bool = False
    width: int = 0
    given: int = 0
    left: int = 0
    step: int = 0
    filled: int = 0
    fed: range = range(0)
    others: int = 0


class BlockDiffusionStrategy:
    """State of a row: its block, being filled or about to be cached."""

    prefills_prompt = True
    prompt_mask_block: tuple[int, ...] = ()
    draft_policy = None

    def __init__(
        self,
        backbone: Backbone,
        mask_id: int,
        end_ids: tuple[int, ...],
        block_length: int,
        settings: BlockDiffusionSettings,
    ) -> None:
        self.backbone, self.mask_id, self.end_ids, self.settings = backbone, mask_id, frozenset(end_ids), settings
        self.block_length = block_length
        # A small block stands behind the rest of its block, and may be padded to a whole one by other rows.
        self.max_slots = block_length * (2 if settings.block_cache else 1)
        self.small_block = settings.small_block_length(block_length)
        at_end = settings.grid == "prompt end"
        self.prompt_blocks = PromptBlocks(block_length, at_end) if settings.context == "block" else None

    def allocate(self, rows: int) -> None:
        device = self.backbone.device
        self._block = torch.full((rows, self.block_length), self.mask_id, device=device)
        self._is_written = torch.zeros(rows, self.block_length, dtype=torch.bool, device=device)
        self._ages = torch.zeros_like(self._block)  # denoise forwards since a slot was written
        self._width = torch.zeros(rows, dtype=torch.long, device=device)
        self._host = [_Block()] * rows
        self._generators = [torch.Generator() for _ in range(rows)]

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> list[RowUpdate]:
        for row, request in enumerate(requests, start):
            self._generators[row] = torch.Generator().manual_seed(request.seed)
            self._host[row] = _Block(left=request.max_new_tokens)
        prompts = [request.prompt for request in requests]
        cached = [self.prompt_blocks.cached(len(p)) if self.prompt_blocks else len(p) for p in prompts]
        given = [list(prompt[end:]) for prompt, end in zip(prompts, cached, strict=True)]
        self._open(
            list(range(start, start + len(requests))), hidden[:, 0] if hidden is not None else None, window_left, given
        )
        updates = empty_updates(len(requests))
        self._read_back(start, updates)
        return updates

    def plan(self, rows: int) -> Feed:
        widths, kinds, bidirectional = list[int](), list[Kind](), list[int]()
        active = self._host[:rows]
        for block in active:
            widths.append(len(block.fed))
            kinds.append("commit" if block.is_full else "denoise")
            is_causal = block.is_full and self.settings.context == "causal"
            bidirectional.append(0 if is_causal else len(block.fed))
        device, slots = self._block.device, max(widths)
        intervals = attention_masks.bidirectional(torch.tensor(bidirectional, device=device), slots)
        if not any(block.others for block in active):
            return Feed(self._block[:rows, :slots], widths, kinds, intervals)
        # small blocks: their positions are not their columns, which are behind the block's other slots
        first = torch.tensor([[block.fed.start, block.others] for block in active], device=device)  # (n, 2)
        slot = first[:, :1] + torch.arange(slots, device=device)  # (n, S)
        ids = self._block[:rows].gather(1, slot.clamp(max=self.block_length - 1))
        return Feed(ids, widths, kinds, intervals._replace(offsets=slot - first[:, 1:]))

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> list[RowUpdate]:
        denoised, committed = list[int](), list[int]()
        for row, kind in enumerate(feed.kinds):
            (committed if kind == "commit" else denoised).append(row)
        updates = empty_updates(len(feed.kinds))
        # 1) denoise
        if denoised:
            at = torch.tensor(denoised, device=hidden.device)
            states = hidden[at]
            if self.settings.shift:
                states = torch.cat([states[:, :1], states[:, :-1]], 1)  # (n, S, D), at the slot predicted
            self._fill(at, self._at_their_slots(denoised, self.backbone.logits(states)))
        # 2) commit, and open the next block, from the last slot where predictions are shifted
        if committed:
            at = torch.tensor(committed, device=hidden.device)
            for row, tokens, ages in zip(committed, self._block[at].tolist(), self._ages[at].tolist(), strict=True):
                updates[row] = self._committed(self._host[row], tokens, ages)
            last = hidden[at, self._width[at] - 1]  # (R, D)
            left = [window_left[row] - feed.widths[row] for row in committed]
            self._open(committed, last, left, [[] for _ in committed])
        # 3) commit blocks that hold the answer's end
        self._read_back(0, updates)
        # 4) choose the slots of the next denoise forwards
        for row in denoised if self.settings.block_cache else ():
            updates[row] = self._narrowed(row, updates[row])
        return updates

    def _at_their_slots(self, rows: list[int], logits: Tensor) -> Tensor:
        """Logits of fed slots, (n, S, V), by slots of the block; those of slots not fed mean nothing."""
        starts = [self._host[row].fed.start for row in rows]
        if not any(starts):
            return logits
        reach = max(self._host[row].fed.stop for row in rows)
        slot = torch.arange(reach, device=logits.device) - torch.tensor(starts, device=logits.device)[:, None]
        index = slot.clamp(0, logits.shape[1] - 1)  # (n, reach)
        return logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))

    def _narrowed(self, row: int, update: RowUpdate) -> RowUpdate:
        """Feed the current small block alone once its first slot is written, until it is full, then all slots again.

        Returns the update with what the cache keeps for that.  (Fast-dLLM v2, public code)
        """
        block = self._host[row]
        start = block.filled // self.small_block * self.small_block
        if block.is_full or block.filled == start:
            self._host[row] = block._replace(fed=range(block.width), others=0)
            return update._replace(dropped=block.others)
        if block.others:
            return update
        fed = range(start, min(start + self.small_block, block.width))
        others = [*range(fed.start), *range(fed.stop, block.width)]
        self._host[row] = block._replace(fed=fed, others=len(others))
        return update._replace(cached=others)

    def _committed(self, block: _Block, tokens: list[int], ages: list[int]) -> RowUpdate:
        """A row's update once its block is cached, with the block's tokens unless they are in the answer already."""
        if self.settings.ends == "block":
            return RowUpdate([], [], range(block.width))
        answer = slice(block.given, block.width)
        return RowUpdate(tokens[answer], [age + 1 for age in ages[answer]], range(block.width))  # one forward more

    def move(self, source: int, target: int) -> None:
        for state in (self._block, self._is_written, self._ages, self._width):
            state[target] = state[source]
        self._host[target], self._generators[target] = self._host[source], self._generators[source]

    def _open(self, rows: list[int], hidden: Tensor | None, window_left: list[int], given: list[list[int]]) -> None:
        """Start a block with what is known of it.

        hidden: (R, D), at the token before the block.  given: tokens of the prompt that the block begins with.
        """
        at = torch.tensor(rows, device=self._block.device)
        # 1) masks, as many as fit
        widths = []
        for row, window, tokens in zip(rows, window_left, given, strict=True):
            block = self._host[row]
            left = block.left - max(0, block.width - block.given)
            width = min(self.block_length, window, left if self.settings.clips_last else self.block_length)
            self._host[row] = _Block(width=width, given=len(tokens), left=left, fed=range(width))
            widths.append(width)
        self._width[at] = torch.tensor(widths, device=at.device)
        self._block[at] = self.mask_id
        self._is_written[at] = False
        self._ages[at] = 0
        # 2) its first token, or the prompt's last ones
        if self.settings.shift and hidden is not None:
            logits = self.backbone.logits(hidden)  # (R, V)
            first = self._choose(at, logits[:, None])[0][:, 0] if self.settings.samples_first else logits.argmax(-1)
            self._block[at, 0] = first
            self._is_written[at, 0] = first != self.mask_id
        for row, tokens in zip(rows, given, strict=True):
            self._block[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long, device=at.device)
            self._is_written[row, : len(tokens)] = True

    def _fill(self, rows: Tensor, logits: Tensor) -> None:
        """Write masked slots of each current small block: as many as scheduled, the best first, and all above the
        threshold.

        A slot that predicts the mask token stays open. Without a schedule it does not where the pass wrote nothing
        else: the public code would not end there. Under one, slots that are open at its end stay masks for good.
        logits: (n, S, V), each at the slot predicted; slot 0, where the token before the block predicted a mask,
        predicts itself.
        """
        reach = logits.shape[1]
        slot = torch.arange(reach, device=rows.device)
        # 1) the masked slots of the small block that holds the first masked slot
        is_masked = ~self._is_written[rows, :reach] & (slot < self._width[rows, None])  # (n, S)
        current = is_masked.int().argmax(-1, keepdim=True) // self.small_block  # (n, 1)
        is_open = is_masked & (slot // self.small_block == current)
        # 2) those to be written
        counts, is_last = self._scheduled(rows)  # (n, 1) each
        token, score = self._predict(rows, logits)  # (n, S) each
        score = score.masked_fill(~is_open, -torch.inf)
        best, order = score.sort(dim=-1, descending=True, stable=True)
        if self.settings.selection == "entropy bound":
            counts = ((-best).cumsum(-1) < self.settings.entropy_bound).sum(-1, keepdim=True).clamp(min=1)
        is_best = torch.zeros_like(is_open).scatter_(1, order, slot < counts)
        is_chosen = is_open & (is_best | (score > self.settings.confidence_threshold))
        # 3) without those that predict the mask token
        is_token = is_chosen & (token != self.mask_id)
        if self.settings.schedule == "one":
            writes = torch.where(is_token.any(-1, keepdim=True), is_token, is_chosen)
        else:
            writes = is_token | (is_masked & is_last)
            token = torch.where(is_token, token, self.mask_id)
        # 4) write
        self._block[rows, :reach] = torch.where(writes, token, self._block[rows, :reach])
        self._is_written[rows, :reach] |= writes
        self._ages[rows, :reach] = (self._ages[rows, :reach] + 1).masked_fill(writes, 0)

    def _scheduled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Least tokens of each row's denoise forward, and whether it is the block's last: (n, 1) each.

        The row's next forward is one step on.
        """
        counts, is_last = list[int](), list[bool]()
        for row in rows.tolist():
            block = self._host[row]
            schedule = self._schedule(block)
            counts.append(schedule[block.step] if schedule else 1)
            is_last.append(block.step + 1 == len(schedule))
            self._host[row] = block._replace(step=block.step + 1)
        return torch.tensor(counts, device=rows.device)[:, None], torch.tensor(is_last, device=rows.device)[:, None]

    def _schedule(self, block: _Block) -> tuple[int, ...]:
        """Tokens of each denoise forward of a block, empty where their number is open."""
        settings, steps = self.settings, self.settings.steps_for(self.block_length)
        if settings.schedule == "even":
            return transfer_schedule.even(self.block_length, steps)
        return transfer_schedule.by_alpha(block.width, steps, settings.alpha) if settings.schedule == "alpha" else ()

    def _predict(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token and a score for every slot, (n, S) each; the highest scores are written first.  logits: (n, S, V)."""
        settings = self.settings
        token, confidence = self._choose(rows, logits)
        if settings.selection == "sequential":
            return token, -torch.arange(logits.shape[1], device=rows.device).expand_as(confidence).float()
        if settings.selection == "random":
            return token, self._draws(rows, logits.shape[1]).to(logits.device)
        if settings.selection == "entropy bound":
            probability = (logits / (settings.temperature or 1.0)).softmax(-1).clamp(min=LEAST_PROBABILITY)
            return token, (probability * probability.log()).sum(-1)
        if settings.temperature > 0 and not settings.tempered:
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
        return token, confidence

    def _choose(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token and a confidence for every slot. logits: (n, S, V).  Returns (n, S) each."""
        settings, (n, slots, vocabulary) = self.settings, logits.shape
        draws = self._draws(rows, slots) if settings.temperature > 0 else torch.zeros(n, slots)
        if 0 < settings.top_k < vocabulary and settings.temperature > 0:
            logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[..., -1:], -torch.inf)
        flat_logits, flat_draws = logits.reshape(-1, vocabulary), draws.reshape(-1).to(logits.device)
        token, confidence = choose(flat_logits, flat_draws, settings.temperature, settings.nucleus, settings.rule)
        return token.reshape(n, slots), confidence.reshape(n, slots)

    def _draws(self, rows: Tensor, slots: int) -> Tensor:
        """Uniform random numbers, (n, slots). A row draws for its widest block, so that its numbers do not depend on
        how wide the batch is.
        """
        numbers = [torch.rand(self.block_length, generator=self._generators[row]) for row in rows.tolist()]
        return torch.stack(numbers)[:, :slots]

    def _read_back(self, start: int, updates: list[RowUpdate]) -> None:
        """Update the host's copy of rows start.., and commit the final tokens of blocks where the answer may end there.

        Final are tokens without a mask before them in their small block. `updates` of rows start.. get the tokens.
        """
        slot = torch.arange(self.block_length, device=self._block.device)
        rows = slice(start, start + len(updates))
        is_done = self._is_written[rows] | (slot >= self._width[rows, None])
        filled = is_done.cumprod(1).sum(1)  # (n,) slots before the first mask
        state = torch.cat([filled[:, None], self._block[rows], self._ages[rows]], 1)
        for number, (reached, *slots) in enumerate(state.tolist()):
            tokens, ages = slots[: self.block_length], slots[self.block_length :]
            block = self._host[start + number]
            block = block._replace(is_full=reached >= block.width, filled=reached)
            self._host[start + number] = block
            answer = slice(block.given, self._final(block, reached))
            has_end = not self.end_ids.isdisjoint(tokens[answer])
            if block.is_full if self.settings.ends == "block" else has_end and self.settings.ends != "commit":
                updates[number].tokens.extend(tokens[answer])
                updates[number].ages.extend(ages[answer])

    def _final(self, block: _Block, reached: int) -> int:
        """Slots of a block whose tokens are looked through for an end. reached: slots before the first mask."""
        if block.is_full:
            return block.width
        return reached if self.settings.ends == "token" else reached // self.small_block * self.small_block


def open_strategy(checkpoint: Checkpoint, settings: BlockDiffusionSettings) -> BlockDiffusionStrategy:
    """The strategy of these settings, with the checkpoint's block length."""
    assert checkpoint.mask_id is not None
    length = settings.block_length_for(checkpoint.manifest.block_length if checkpoint.manifest else None)
    return BlockDiffusionStrategy(checkpoint.backbone, checkpoint.mask_id, checkpoint.end_ids, length, settings)
