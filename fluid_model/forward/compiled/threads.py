"""How many threads a forward is worth. `csrc/pool.c` has the threads."""

from __future__ import annotations

import torch

OPERATIONS_PER_THREAD = 1e8
"""Multiplications and additions for which one more thread is worth waking."""
FREE_SLOTS = 8
"""Fewer slots take as long as so many: they wait for the weights."""


def worth(weights: int, slots: int) -> int:
    """Threads for linear maps of so many weights over so many slots; at most torch's."""
    operations = 2 * weights * max(slots, FREE_SLOTS)
    return max(1, min(torch.get_num_threads(), int(operations // OPERATIONS_PER_THREAD)))
