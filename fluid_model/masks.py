"""The one place that says who may read whom.

Legend: B rows, S slots fed this forward, T key columns of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slot_columns(lengths: Tensor, slots: int) -> Tensor:
    """Cache column of every fed slot: a row's slots follow its own length.

    lengths: (B,) tokens already cached.  Returns (B, S) long.
    """
    return lengths[:, None] + torch.arange(slots, device=lengths.device)


def causal(columns: Tensor, total: int) -> Tensor:
    """Strictly causal reading: a slot reads every column up to its own and nothing after it.

    columns: (B, S) cache column of each fed slot.  total: T, columns to consider.
    Returns (B, S, T) bool, [row, query, key], True = may read.  (FLUID, strictly causal alignment)
    """
    return torch.arange(total, device=columns.device) <= columns[:, :, None]


def sliding(columns: Tensor, total: int, window: int) -> Tensor:
    """Causal reading of the last `window` columns only, the slot's own included.  (B, S) -> (B, S, T) bool."""
    near = torch.arange(total, device=columns.device) > columns[:, :, None] - window
    return causal(columns, total) & near


def fans(anchor: Tensor, step: Tensor) -> Tensor:
    """Who may read whom in expanded rows: real tokens read real tokens at or before them; a fan slot reads real tokens
    up to its anchor, the earlier slots of its own fan and itself; no one reads another fan.

    anchor: (B, L) position of the real token each slot hangs on (its own for a real token, -1 for padding).
    step: (B, L) 0 for a real token, 1..K for a fan slot.
    Returns (B, L, L) bool, [row, query, key], True = may read; padding reads itself.  (FLUID, strictly causal
    alignment)
    """
    query_anchor, key_anchor = anchor[:, :, None], anchor[:, None, :]
    query_step, key_step = step[:, :, None], step[:, None, :]
    real = (key_step == 0) & (key_anchor <= query_anchor) & (key_anchor >= 0)
    own_fan = (key_step > 0) & (key_anchor == query_anchor) & (key_step <= query_step)
    itself = torch.eye(anchor.shape[1], dtype=torch.bool, device=anchor.device)
    return real | own_fan | itself
