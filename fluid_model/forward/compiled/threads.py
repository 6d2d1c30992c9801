"""Rows of a batch on several threads. The compiled code holds no lock, and ctypes releases Python's."""

from __future__ import annotations

import functools
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

OPERATIONS_PER_THREAD = 1e8
"""Multiplications and additions from which on another thread is worth waking."""

Result = TypeVar("Result")


def split_rows(counts: Sequence[int], operations: int) -> list[range]:
    """Ranges of rows of about equal work, one for each thread worth waking.

    counts: slots of each row.  operations: of one slot.
    """
    slots = sum(counts)
    threads = max(1, min(torch.get_num_threads(), len(counts), int(operations * slots // OPERATIONS_PER_THREAD)))
    if threads == 1:
        return [range(len(counts))]
    ends = [*accumulate(counts)]
    cuts = [0, *(bisect_left(ends, slots * part / threads) + 1 for part in range(1, threads)), len(counts)]
    return [range(start, stop) for start, stop in pairwise(cuts) if start < stop]


def run_all(run: Callable[[range], Result], parts: Sequence[range]) -> list[Result]:
    """Results of all parts, the first on this thread and each other on one of its own."""
    if len(parts) == 1:
        return [run(parts[0])]
    others = [_pool(os.getpid()).submit(run, part) for part in parts[1:]]
    return [run(parts[0]), *(other.result() for other in others)]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: they do not live on in a fork of it."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="forward")
