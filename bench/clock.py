"""Timing: systems side by side, seconds of a call, steps outside and inside a model, copy bandwidth, rate of matrix
products.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WARM = 3
"""Warm-up calls, not timed."""
COPIED = {"cuda": 2**31, "cpu": 2**26}
"""Bytes of a copy, many times the caches."""
SIDE = {"cuda": 8192, "cpu": 512}
"""Side of square matrices large enough to saturate the device."""


@dataclass(frozen=True)
class Speeds:
    """Units a second of some systems. runs: of each system, one a turn."""

    runs: Mapping[str, list[float]]

    def __getitem__(self, name: str) -> float:
        """Of one system: the median."""
        return statistics.median(self.runs[name])

    def ratio(self, name: str, other: str) -> float:
        """Of two systems: the median of the turns' ratios. Other work that comes and goes slows both in a turn."""
        pairs = zip(self.runs[name], self.runs[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def side_by_side(systems: Mapping[str, Callable[[], float]], runs: int, seconds: float = 0) -> Speeds:
    """Speed of systems that take turns, in alternating order: `runs` turns, and more until `seconds` have passed.

    systems: calls that return units done. Each is called once before, to warm up.
    """
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for system in systems.values():
        system()
    begun = time.perf_counter()
    for run in itertools.count():
        if run >= runs and time.perf_counter() - begun >= seconds:
            break
        for name in reversed(speeds) if run % 2 else speeds:
            started = time.perf_counter()
            count = systems[name]()
            speeds[name].append(count / (time.perf_counter() - started))
    return Speeds(speeds)


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


def step_times(call: Callable[[], Any], parts: Mapping[str, object], rows: int, runs: int) -> list[tuple[float, float]]:
    """Seconds of decoding steps of so many rows, (outside, inside) the model: processor time of the calling thread,
    from the end of one forward to the end of the next. A run more than `runs`, the first, warms up.

    call: decodes.  parts: the model's methods that it calls, by name, with their owners; "forward" ends a step.
    """
    steps: list[tuple[float, float]] = []
    for run in range(runs + 1):
        calls: list[tuple[str, int, float, float]] = []  # name, rows, start, end
        for name, owner in parts.items():
            setattr(owner, name, _clocked(name, getattr(owner, name), calls))
        call()
        for name, owner in parts.items():
            delattr(owner, name)
        before, inside = None, 0.0
        for name, count, start, end in calls:
            inside += end - start
            if name == "forward":
                if run and count == rows and before is not None:
                    steps.append((end - before - inside, inside))
                before, inside = (end if count == rows else None), 0.0
    return steps


def _clocked(name: str, call: Callable[..., Any], calls: list[tuple[str, int, float, float]]) -> Callable[..., Any]:
    """The same call, which appends to `calls`."""

    def timed(*words: Any) -> Any:
        start = time.thread_time()
        result = call(*words)
        calls.append((name, len(words[0]), start, time.thread_time()))
        return result

    return timed


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
