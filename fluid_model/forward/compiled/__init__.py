"""The explicit Llama forward compiled to C, for weights in float32, bfloat16 or int8 on a CPU; sums are float32.

Torch takes longer to be called than a model of a few million weights takes to compute. Here a forward is one call. A
slot's numbers are the same to the last bit in every batch, and among draft tokens and mask blocks as in autoregressive
decoding. Where there is no compiler, or the model does not fit, torch runs instead: see `forward_choice`.

    forward.py   CompiledForward: calls of the forward and of the vocabulary projection
    k_head.py    predicted strides of a K-head
    logits.py    the likeliest tokens; whether numbers are finite
    weights.py   weights packed in panels, and whether they have changed
    threads.py   how many threads a forward is worth
    build.py     compiler, flags, the cached library
    structs.py   structures and functions of the library, as ctypes
    csrc/        the C sources, one for each step; pool has the threads
"""

from __future__ import annotations

from .build import library, native_lanes, why_not
from .forward import CompiledForward, attention_mask
from .k_head import strides
from .logits import all_finite, rank, select

__all__ = [
    "CompiledForward", "all_finite", "attention_mask", "library", "native_lanes", "rank", "select", "strides",
    "why_not",
]  # fmt: skip
