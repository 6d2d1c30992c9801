"""The likeliest tokens, and whether numbers are finite, compiled.

Legend: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import build
from .weights import readable

SHARED = 2**17
"""Logits from which on threads share the rows: some 100 microseconds of one thread."""


def rank(logits: Tensor, single: int, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The likeliest token of the first `single` rows, (single,); of the others the k likeliest in falling order and
    their probabilities, (M - single, k) each. The first of equals ranks first.  logits: (M, V).
    None if torch must compute them (another dtype, device).
    """
    library = build.library(build.native_lanes()) if readable([logits]) else None
    if library is None:
        return None
    logits, (rows, vocabulary) = logits.contiguous(), logits.shape
    tokens = torch.empty(single + (rows - single) * k, dtype=torch.long)
    probabilities = torch.empty(rows - single, k)
    workers = torch.get_num_threads() if logits.numel() >= SHARED else 1
    first = tokens.data_ptr()
    library.rank_logits(
        single, rows, vocabulary, logits.data_ptr(), first, k, first + 8 * single, probabilities.data_ptr(), workers
    )
    return tokens[:single], tokens[single:].view(-1, k), probabilities


def select(hidden: Tensor, places: Tensor, first: int) -> Tensor | None:
    """The states at some places, one behind the other: those from the first-th on. None where torch is to select.

    hidden: (n, S, D).  places: (any,) in (n S).
    """
    library = build.library(build.native_lanes()) if readable([hidden]) else None
    if library is None:
        return None
    hidden, count, size = hidden.contiguous(), len(places) - first, hidden.shape[-1]
    selected = torch.empty(count, size)
    library.select_states(hidden.data_ptr(), size, places.data_ptr() + 8 * first, count, selected.data_ptr())
    return selected


def all_finite(numbers: Tensor) -> bool | None:
    """Whether all of them are finite. None where torch is to look."""
    library = build.library(build.native_lanes()) if readable([numbers]) else None
    if library is None:
        return None
    numbers = numbers.contiguous()
    return bool(library.all_finite(numbers.data_ptr(), numbers.numel()))
