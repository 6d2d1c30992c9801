"""The most probable tokens, and whether numbers are finite, compiled.

Legend: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import build
from .weights import readable

SHARED = 2**18
"""Logits from which on threads share the rows: some 100 microseconds of one thread."""


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k most probable tokens of each row and their probabilities: (M, V) -> (M, k) each, the first of equals first.
    None if torch must compute them (another dtype, device).
    """
    library = build.library(build.native_lanes()) if readable([logits]) else None
    if library is None:
        return None
    logits, (rows, vocabulary) = logits.contiguous(), logits.shape
    tokens, probabilities = torch.empty(rows, k, dtype=torch.long), torch.empty(rows, k)
    workers = torch.get_num_threads() if logits.numel() >= SHARED else 1
    addresses = tokens.data_ptr(), probabilities.data_ptr()
    library.top_k(rows, vocabulary, logits.data_ptr(), k, *addresses, workers)
    return tokens, probabilities


def all_finite(numbers: Tensor) -> bool | None:
    """Whether all of them are finite. None where torch is to look."""
    library = build.library(build.native_lanes()) if readable([numbers]) else None
    if library is None:
        return None
    numbers = numbers.contiguous()
    return bool(library.all_finite(numbers.data_ptr(), numbers.numel()))
