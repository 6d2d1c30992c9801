"""Timing on a device: seconds of a call, copy bandwidth, rate of matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM = 3
"""Warm-up calls, not timed."""
COPIED = {"cuda": 2**31, "cpu": 2**26}
"""Bytes of a copy, many times the caches."""
SIDE = {"cuda": 8192, "cpu": 512}
"""Side of square matrices large enough to saturate the device."""


def took(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has finished a call, and the call's result."""
    _wait(device)
    started = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - started, result


def median(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Median seconds of a call."""
    return statistics.median([took(call, device)[0] for _ in range(WARM + runs)][WARM:])


def copy_bandwidth(device: torch.device, runs: int) -> float:
    """Bytes a second that a copy within the device reads and writes."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device.type != "cuda":
        return 2 * source.nbytes / median(lambda: target.copy_(source), device, runs)
    seconds = []
    for _ in range(WARM + runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(float(start.elapsed_time(end)) / 1000)
    return 2 * source.nbytes / statistics.median(seconds[WARM:])


def product_rate(device: torch.device, dtype: torch.dtype, runs: int) -> float:
    """FLOP/s (multiplications and additions) of a product of large square matrices."""
    side = SIDE[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median(lambda: one @ other, device, runs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
