"""The most probable tokens, and whether numbers are finite, compiled.

Legend: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import build
from .weights import readable


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k most probable tokens of each row and their probabilities: (M, V) -> (M, k) each, the first of equals first.
    None if torch must compute them (another dtype, device).
    """
    library = build.library(build.native_lanes()) if readable([logits]) else None
    if library is None:
        return None
    logits, rows = logits.contiguous(), len(logits)
    tokens, probabilities = torch.empty(rows, k, dtype=torch.long), torch.empty(rows, k)
    library.top_k(rows, logits.shape[-1], logits.data_ptr(), k, tokens.data_ptr(), probabilities.data_ptr())
    return tokens, probabilities


def all_finite(numbers: Tensor) -> bool | None:
    """Whether all of them are finite. None where torch is to look."""
    library = build.library(build.native_lanes()) if readable([numbers]) else None
    if library is None:
        return None
    numbers = numbers.contiguous()
    return bool(library.all_finite(numbers.data_ptr(), numbers.numel()))
