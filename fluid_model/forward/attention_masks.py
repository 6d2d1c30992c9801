"""The attention mask rule: which slot attends to which. One rule for inference, training and the compiled forward.

Slots fed together form a tree in preorder. Each has an interval [enter, exit): it enters where it stands in that order,
and exits where its subtree ends. Slot q attends to slot k where q entered inside k's interval:

    enter[k] <= enter[q] < exit[k]                                                              (`attends`)

This is the ancestor test of tree attention (SpecInfer, Miao et al. 2023; Medusa, Cai et al. 2024). A draft tree with a
mask block of two slots anchored at each of two tokens; `enter` is token * MAX_STEPS + step, shown as token.step:

    slot             enter  exit    attends to (beside the cache)
    the bonus token   0.0   4.0     itself
    ├─ the cat        1.0   3.0     bonus, itself
    │  └─ the sat     2.0   3.0     bonus, cat, itself
    │     ├─ mask 1   2.1   3.0     bonus, cat, sat, itself
    │     └─ mask 2   2.2   3.0     bonus, cat, sat, mask 1, itself
    └─ a dog          3.0   4.0     bonus, itself
          ├─ mask 1   3.1   4.0     bonus, dog, itself
          └─ mask 2   3.2   4.0     bonus, dog, mask 1, itself

Causal attention is the chain: every slot exits after all others. Bidirectional attention is one shared `enter`.

Legend: B rows, S slots fed this forward, T key columns of the cache, L slots of a training row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_STEPS = 2**16
"""Places in preorder that one token takes up: itself and the slots of the mask block anchored at it."""
NEVER, ALWAYS = 0, 2**62
"""Exits of slots that nothing attends to (padding), and of tokens that everything behind attends to."""


def attends(query_enter: Tensor, key_enter: Tensor, key_exit: Tensor) -> Tensor:
    """The mask rule, see the module's docstring. Broadcasts; bool."""
    return (key_enter <= query_enter) & (query_enter < key_exit)


class AttentionIntervals(NamedTuple):
    """Tree-attention intervals of slots fed together, (B, S) long each.

    enter: MAX_STEPS times the token that a slot is anchored at, counted from the first fed, plus its step in the mask
    block, from 1 on; a token is anchored at itself with step 0. Slots that share an `enter` attend to one another.
    exit: where its subtree ends; NEVER of padding that other slots could reach.
    offsets: position ids, counted from the row's first fed slot.
    """

    enter: Tensor
    exit: Tensor
    offsets: Tensor

    @property
    def steps(self) -> Tensor:
        """(B, S), 0 for tokens, 1.. for slots of a mask block."""
        return self.enter % MAX_STEPS


@dataclass(frozen=True)
class AttentionPlan:
    """One forward over the cache: where its slots are written and what they attend to. All attend to their row's cached
    tokens.

    columns: (B, S) cache column of each fed slot, behind the row's cached tokens.  total: T, columns in use.
    widths: slots of each row that count, the rest being padding (None: all).
    intervals: mask rule among the slots fed (None: causal).
    """

    columns: Tensor
    total: int
    widths: Sequence[int] | np.ndarray | None = None
    intervals: AttentionIntervals | None = None

    @property
    def positions(self) -> Tensor:
        """(B, S) position ids: the columns, but those of tree and mask-block slots follow their path."""
        return self.columns if self.intervals is None else self.columns[:, :1] + self.intervals.offsets

    def mask(self) -> Tensor:
        """(B, S, T) bool, [row, query, key], True where the query attends to the key."""
        if self.intervals is None:
            return causal(self.columns, self.total)
        enter, exit_, _ = self.intervals
        among_fed = attends(enter[:, :, None], enter[:, None], exit_[:, None])  # (B, S, S)
        cached = torch.arange(self.total, device=enter.device) < self.columns[:, :1]  # (B, T)
        mask = cached[:, None].repeat(1, enter.shape[1], 1)  # (B, S, T)
        return mask.scatter_(2, self.columns[:, None].expand_as(among_fed), among_fed)


def causal(columns: Tensor, total: int) -> Tensor:
    """Strictly causal attention over the cache, the chain of the rule: every column up to the slot's own.

    columns: (B, S) cache column of each fed slot.  total: T, columns to consider.
    Returns (B, S, T) bool, [row, query, key].  (FLUID, strictly causal alignment)
    """
    return torch.arange(total, device=columns.device) <= columns[:, :, None]


def sliding(columns: Tensor, total: int, window: int) -> Tensor:
    """Causal attention to the last `window` columns only, the slot's own included.  (B, S) -> (B, S, T) bool."""
    near = torch.arange(total, device=columns.device) > columns[:, :, None] - window
    return causal(columns, total) & near


def bidirectional(widths: Tensor, slots: int) -> AttentionIntervals:
    """A row's first slots attend to one another, both ways; what follows is causal.

    widths: (B,) slots that do, 0 for rows that stay causal.  (NBDiff, context-causal mask; LLaDA where nothing is
    cached)
    """
    slot = torch.arange(slots, device=widths.device).expand(len(widths), -1)  # (B, S)
    enter = torch.where(slot < widths[:, None], 0, slot * MAX_STEPS)
    return AttentionIntervals(enter, torch.full_like(slot, ALWAYS), slot)


class PromptBlocks(NamedTuple):
    """Block-causal attention over prompts: both directions inside a block, and to all blocks before it.  (Block
    Diffusion, arXiv 2503.09573)

    length: tokens of a block.  at_end: blocks count back from the prompt's end, so that its first one may be partial;
    else from its start, and tokens behind the last whole block are not cached.
    """

    length: int
    at_end: bool

    def cached(self, prompt: int) -> int:
        """Tokens that a prefill caches of a prompt of so many."""
        return prompt if self.at_end else prompt - prompt % self.length

    def own(self, prompt: int) -> int:
        """Tokens at its end that a prompt must feed itself; all where its length decides where blocks begin."""
        return prompt if self.at_end else prompt - self.cached(prompt) + 1

    def intervals(self, cached: Tensor, slots: int) -> AttentionIntervals:
        """Of slots that begin at a prompt's or a block's start. cached: (B,) tokens to cache, shared ones aside."""
        slot = torch.arange(slots, device=cached.device).expand(len(cached), -1)  # (B, S)
        lead = -cached[:, None] % self.length  # places of the first block that are before the prompt
        return AttentionIntervals((slot + lead) // self.length * MAX_STEPS, torch.full_like(slot, ALWAYS), slot)


def mask_blocks(anchor: Tensor, step: Tensor) -> AttentionIntervals:
    """A chain of tokens and mask blocks anchored at some of them, laid out as in training.

    anchor: (B, S) the token that a slot is anchored at, counted from the first fed.  step: (B, S), 0 for tokens.
    (FLUID, strictly causal alignment)
    """
    exit_ = torch.where(step > 0, (anchor + 1) * MAX_STEPS, ALWAYS)
    return AttentionIntervals(anchor * MAX_STEPS + step, exit_, anchor + step)


def prompt_with_mask_block(last: Tensor, slots: int) -> AttentionIntervals:
    """Rows fed from their start, with one mask block anchored at token `last`, (B,). Padding continues the mask block:
    nothing that counts stands behind it, so nothing attends to it.
    """
    slot = torch.arange(slots, device=last.device).expand(len(last), -1)  # (B, S)
    return mask_blocks(torch.minimum(slot, last[:, None]), (slot - last[:, None]).clamp(min=0))


def training_intervals(segment: Tensor, anchor: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Enter and exit of the slots of packed training rows, (B, L) each; see `train.row_layouts`.

    segment: (B, L) number of the packed example, -1 for padding.  anchor: (B, L) slot of the last token attended to,
    counted over the row; the slot before the example where a block is its first.  step: (B, L), 0 for tokens.
    (FLUID, strictly causal alignment; NBDiff, context-causal mask)
    """
    # One place more for each example, so that a block before its first token is apart from the last token before it.
    token = anchor + 1 + segment
    example = segment + 1  # padding is example 0
    ends = token.new_zeros(len(token), token.shape[1] + 1)  # by example: behind its last token; L examples at most
    ends.scatter_reduce_(1, example, token + 1, "amax")
    exit_ = torch.where(step > 0, token + 1, ends.gather(1, example)) * MAX_STEPS
    padding = segment < 0
    return (token * MAX_STEPS + step).masked_fill(padding, NEVER), exit_.masked_fill(padding, NEVER)


def training_mask(segment: Tensor, anchor: Tensor, step: Tensor) -> Tensor:
    """Dense attention mask of packed training rows: (B, L) each, see `training_intervals` -> (B, L, L) bool, [row,
    query, key]. Padding attends to itself alone: a row of the mask must not be empty.
    """
    enter, exit_ = training_intervals(segment, anchor, step)
    itself = torch.eye(anchor.shape[1], dtype=torch.bool, device=anchor.device)
    return attends(enter[:, :, None], enter[:, None], exit_[:, None]) | itself
