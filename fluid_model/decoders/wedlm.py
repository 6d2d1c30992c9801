"""WeDLM's decoder, batched: a sliding window of masks under causal attention (arXiv 2512.22737), as its public engine
runs it (github.com/Tencent/WeDLM at 0216110f2469, `wedlm/engine`).

A row's window follows its cached tokens. Its slots are masks, or tokens that earlier steps wrote, in any order. A step
is one forward, which feeds tokens first and masks behind them. Positions stay those of the text. Attention is causal in
the order fed: a mask attends to all written tokens, also to those behind it in the text, and no token to a mask.

    window of 4, behind 9 cached tokens     The  [m]  sat  [m]          "The" and "sat" are written
    and as many masks as tokens in front    The  [m]  sat  [m]  [m]
    fed                                     The  sat  [m]  [m]  [m]
    at positions                             9   11   10   12   13
    the step commits "The"                       [m]  sat  [m]  [m]     and may write some of the masks

A step commits the tokens before the first mask. They were fed first, so they attended to nothing behind them and stay
cached. Of the masks it writes those of low entropy, in place. Tokens behind a mask are fed again.

Legend: n active rows, S slots fed, M masks of all rows, m masks of one, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checkpoints.checkpoint import Checkpoint
from ..engine.records import Kind, Request
from ..engine.strategy import Feed, RowUpdate, empty_updates
from ..forward import attention_masks
from ..settings.wedlm import WedlmSettings
from .sampling import argmax, choose, restrict


class _Slot(NamedTuple):
    """A place of the window. step: the one that wrote its token, 0 for a mask."""

    token: int
    step: int = 0


@dataclass
class _Window:
    """One row. slots: in the order of the text.  steps: so far."""

    slots: list[_Slot]
    generator: torch.Generator
    steps: int = 0

    @property
    def masks(self) -> list[int]:
        """(m,) places of masks."""
        return [place for place, slot in enumerate(self.slots) if not slot.step]

    @property
    def prefix(self) -> int:
        """Tokens before the first mask."""
        return next(iter(self.masks), len(self.slots))

    @property
    def order(self) -> list[int]:
        """Places as they are fed: tokens, then masks."""
        return sorted(range(len(self.slots)), key=lambda place: not self.slots[place].step)


class WedlmStrategy:
    """State of a row: its window."""

    prefills_prompt = True
    prompt_mask_block: tuple[int, ...] = ()
    draft_policy = None

    def __init__(self, checkpoint: Checkpoint, settings: WedlmSettings) -> None:
        assert checkpoint.mask_id is not None
        self.backbone, self.settings, self.mask = checkpoint.backbone, settings, _Slot(checkpoint.mask_id)
        self.max_slots = 2 * settings.window

    def allocate(self, rows: int) -> None:
        self._windows = [_Window([], torch.Generator()) for _ in range(rows)]

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> list[RowUpdate]:
        for row, (request, left) in enumerate(zip(requests, window_left, strict=True), start):
            masks = [self.mask] * min(self.settings.window, left)
            self._windows[row] = _Window(masks, torch.Generator().manual_seed(request.seed))
        return empty_updates(len(requests))

    def plan(self, rows: int) -> Feed:
        ids, offsets, kinds = list[Tensor](), list[Tensor](), list[Kind]()
        for window in self._windows[:rows]:
            ids.append(torch.tensor([window.slots[place].token for place in window.order]))
            offsets.append(torch.tensor(window.order))
            kinds.append("denoise" if window.masks else "commit")
        widths, device = list(map(len, ids)), self.backbone.device
        padded = pad_sequence(ids, batch_first=True).to(device)  # (n, S)
        chain = attention_masks.bidirectional(torch.zeros(rows, dtype=torch.long, device=device), padded.shape[1])
        intervals = chain._replace(offsets=pad_sequence(offsets, batch_first=True).to(device))
        return Feed(padded, widths, kinds, intervals)

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> list[RowUpdate]:
        windows = self._windows[: len(feed.widths)]
        # 1) predict the masks of all rows
        counts = [len(window.masks) for window in windows]
        fed = zip(hidden, feed.widths, counts, strict=True)
        states = torch.cat([slots[width - count : width] for slots, width, count in fed])  # (M, D)
        tokens, entropies = self._predict(windows, states)  # (M,) each
        updates = []
        for window, left, token, entropy in zip(
            windows, window_left, tokens.split_with_sizes(counts), entropies.split_with_sizes(counts), strict=True
        ):
            # 2) write masks of low entropy
            committed = window.prefix
            self._write(window, token.tolist(), entropy)
            # 3) commit the tokens in front
            front = window.slots[:committed]
            ages = [window.steps - slot.step for slot in front]
            updates.append(RowUpdate([slot.token for slot in front], ages, range(committed)))
            del window.slots[:committed]
            # 4) add masks at the end, as many as the next step will commit, inside the context window
            room = left - committed - len(window.slots)
            window.slots += [self.mask] * min(window.prefix, room)
        return updates

    def move(self, source: int, target: int) -> None:
        self._windows[target] = self._windows[source]

    def _predict(self, windows: list[_Window], states: Tensor) -> tuple[Tensor, Tensor]:
        """A token and the entropy of every mask, on the host. states: (M, D) -> (M,) each."""
        settings = self.settings
        if not len(states):  # windows that reach the end of the context window, all written
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        logits = self.backbone.logits(states)  # (M, V)
        entropies = torch.special.entr(logits.softmax(-1)).sum(-1)
        if settings.temperature == 0:
            return argmax(logits).cpu(), entropies.cpu()
        # A row draws for a whole window, so that its numbers do not depend on the batch.
        draws = [torch.rand(settings.window, generator=w.generator)[: len(w.masks)] for w in windows]
        logits = restrict(restrict(logits, 1.0, settings.top_k or None), settings.top_p, None)
        tokens, _ = choose(logits, torch.cat(draws).to(logits.device), settings.temperature, 1.0, "probability")
        return tokens.cpu(), entropies.cpu()

    def _write(self, window: _Window, tokens: list[int], entropies: Tensor) -> None:
        """Write all masks whose entropy, with the penalty, is below the bound, else the one of least: (m,) each."""
        window.steps += 1
        if not tokens:
            return
        masks, settings = window.masks, self.settings
        bound = -math.inf if settings.max_entropy is None else settings.max_entropy
        penalized = entropies + (torch.tensor(masks) - masks[0]) * settings.distance_penalty
        low = (penalized < bound).nonzero()[:, 0].tolist()
        for index in low or [int(penalized.argmin())]:
            window.slots[masks[index]] = _Slot(tokens[index], window.steps)
