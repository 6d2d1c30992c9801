"""How far a real model's forward is from what memory allows.

python -m bench.floor [--model NAME] [--format F] [--only PART] [--runs N] [--quick] [--json]

Every forward reads all weights once, so at one slot it takes as long as two cores take to read them: the floor. A part
measures all formats of the weights in turns, in one process; the median of its runs counts.

    floor    a forward of one slot / the floor
    slots    forwards of more slots / of one
    busy     forwards beside a process that computes without end / alone
    text     tokens/s of AR at batch 1 / of transformers' `generate`, in its better format
    batches  tokens/s of AR / of lm-eval's `hf` backend, float32, 64 GSM8K questions, the best batch of each

Forwards stand behind 200 cached tokens and include the vocabulary projection of every slot.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import fluid_model
from fluid_model import ArSettings, Checkpoint
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.kv_cache import KVCache
from fluid_model.forward.llama import LINEAR

from . import bars
from .bars import Bar
from .clock import side_by_side
from .decode import as_asked, generate, lm_eval_writer, writer
from .prompts import real
from .smol import chats

FORMATS = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of a weight by `model.dtype`."""
CACHED = 200
"""Tokens in the cache before a timed forward."""
SLOTS = (1, 2, 4, 8, 16, 32)
BUSY_SLOTS = (1, 8)
NEW = 32
"""Tokens of an answer, at most, where many are timed together."""
BATCHES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Case:
    """One model in all formats. name: as given.  runs: of which the median."""

    name: str
    models: Mapping[str, Checkpoint]
    runs: int


class Timed:
    """Forwards of one model behind CACHED tokens of one row."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._cache = backbone, KVCache(1, CACHED + max(SLOTS))
        self._ids = torch.arange(1000, 1000 + CACHED + max(SLOTS))[None] % backbone.vocabulary
        self._feed(0, CACHED)
        self.seconds(1)  # packs the vocabulary, too

    def _feed(self, start: int, count: int) -> torch.Tensor:
        plan = self._cache.set_write_positions(0, [start], count, self._backbone.device)
        return self._backbone.forward(self._ids[:, start : start + count], plan, self._cache)

    def seconds(self, slots: int) -> float:
        """Of one forward with the logits of all its slots."""
        started = time.perf_counter()
        self._backbone.logits(self._feed(CACHED, slots))
        return time.perf_counter() - started


def stored_bytes(backbone: Backbone, size: int) -> int:
    """Bytes that a forward of one slot reads: linear maps, vocabulary projection, keys and values.

    size: bytes of a weight.
    """
    model: Any = backbone.model
    layers, config = model.base_model.layers, backbone.config
    weights: int = sum(layer.get_submodule(name).weight.numel() for layer in layers for name in LINEAR)
    weights += model.get_output_embeddings().weight.numel()
    cells: int = 2 * len(layers) * config.num_key_value_heads * layers[0].self_attn.head_dim * CACHED
    return size * weights + torch.finfo(backbone.cache_dtype).bits // 8 * cells


class Memory:
    """A buffer that as many threads read as torch has, each its part."""

    def __init__(self, size: int) -> None:
        self._size, self._memory = size, mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory.write(b"\0" * size)
        self._view = (ctypes.c_char * size).from_buffer(self._memory)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)
        self._search = ctypes.CDLL(None).memchr
        self._search.argtypes, self._search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

    def seconds(self) -> float:
        """Of reading all of it: the C library looks for a byte that is not there, which computes next to nothing."""
        start, part = ctypes.addressof(self._view), self._size // self._threads
        started = time.perf_counter()
        list(self._pool.map(lambda n: self._search(start + n * part, 1, part), range(self._threads)))
        return time.perf_counter() - started


def medians(calls: Mapping[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Medians of seconds that calls measure, all in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append(call())
    return {name: statistics.median(values) for name, values in seconds.items()}


def at(timed: Timed, slots: int) -> Callable[[], float]:
    """A call that times a forward of so many slots."""
    return lambda: timed.seconds(slots)


def floor(case: Case) -> list[Bar]:
    """One slot against a plain read of as many bytes as are stored."""
    results, calls = [], dict[str, Callable[[], float]]()
    sizes = {name: stored_bytes(model.backbone, FORMATS[name]) for name, model in case.models.items()}
    for name, model in case.models.items():
        calls[f"{name} read"] = Memory(sizes[name]).seconds
        calls[f"{name} forward"] = at(Timed(model.backbone), 1)
    took = medians(calls, case.runs)
    for name, size in sizes.items():
        read, forward = took[f"{name} read"], took[f"{name} forward"]
        words = f"{name}: {size / 1e6:.0f} MB read in {1e3 * read:.1f} ms ({size / read / 1e9:.1f} GB/s), one slot "
        print(words + f"{1e3 * forward:.1f} ms", file=sys.stderr)
        results.append(bars.at_most(f"{name}: forward of 1 slot / memory floor", forward / read, 1.4))
    return results


def slots(case: Case) -> list[Bar]:
    """More slots read the same weights. In narrow formats arithmetic takes longer than memory from a few slots on."""
    calls = {
        f"{name} {count}": at(timed, count)
        for name, timed in ((name, Timed(model.backbone)) for name, model in case.models.items())
        for count in SLOTS
    }
    took = medians(calls, case.runs)
    rows = [(name, *(f"{1e3 * took[f'{name} {count}']:.1f}" for count in SLOTS)) for name in case.models]
    print(bars.table(["ms, slots", *map(str, SLOTS)], rows), file=sys.stderr)
    results = []
    for name in case.models:
        ratio, words = took[f"{name} 8"] / took[f"{name} 1"], f"{name}: forward of 8 slots / of 1 slot"
        bound = bars.at_most(words, ratio, 1.3) if name == "float32" else Bar(words, round(ratio, 3), "", None)
        results.append(bound)
    return results


@contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes without end, stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def busy(case: Case) -> list[Bar]:
    """Alone and beside a busy process, in turns."""
    timed = {name: Timed(model.backbone) for name, model in case.models.items()}
    calls = {f"{name}, {count} slots": at(each, count) for name, each in timed.items() for count in BUSY_SLOTS}
    alone: dict[str, list[float]] = {name: [] for name in calls}
    beside: dict[str, list[float]] = {name: [] for name in calls}
    with busy_process() as process:
        for _ in range(case.runs):
            for kind, seconds in ((signal.SIGSTOP, alone), (signal.SIGCONT, beside)):
                os.kill(process.pid, kind)
                for name, value in medians(calls, 3).items():
                    seconds[name].append(value)
    results = []
    for name in calls:
        ratio = statistics.median(beside[name]) / statistics.median(alone[name])
        results.append(bars.at_most(f"{name}: beside one busy process / alone", ratio, 2.5))
    return results


def text(case: Case) -> list[Bar]:
    """AR at batch 1 against `generate`: one question of GSM8K, the prompt's time included."""
    first = next(iter(case.models.values()))
    work = chats(first, real(1) or ["How many legs has a cat?"])
    systems = {name: writer(model, ArSettings(), work, 1) for name, model in case.models.items()}
    for name in ("float32", "bfloat16"):
        if name in case.models:
            systems[f"generate, {name}"] = _generate(case.models[name], work)
    speed = side_by_side(systems, case.runs)
    print("Batch 1, tokens/s: " + ", ".join(f"{name} {speed[name]:.1f}" for name in systems), file=sys.stderr)
    best = max((name for name in systems if name.startswith("generate")), key=speed.__getitem__)
    ratios = {name: speed.ratio(name, best) for name in case.models}
    results = [
        Bar(f"tokens/s at batch 1: AR, {name} / generate, best format", round(ratio, 3), "", None)
        for name, ratio in ratios.items()
    ]
    plain = max(ratios[name] for name in ("float32", "bfloat16") if name in ratios)
    return [*results, bars.at_least("tokens/s at batch 1: AR / generate, best format of each", plain, 4)]


def batches(case: Case) -> list[Bar]:
    """AR of one format against lm-eval's `hf`, both at several batch sizes."""
    model = case.models.get("float32") or next(iter(case.models.values()))
    prompts = real(64) or ["How many legs has a cat?"]
    work = [replace(request, max_new_tokens=NEW) for request in chats(model, prompts)]
    best = {"AR": 0.0, "hf": 0.0}
    for batch in BATCHES:
        systems = {"AR": writer(model, ArSettings(), work, batch)}
        systems["hf"] = lm_eval_writer(case.name, as_asked(model, prompts), batch, NEW)
        speed = side_by_side(systems, case.runs)
        print(f"Batch {batch}, tokens/s: AR {speed['AR']:.1f}, hf {speed['hf']:.1f}", file=sys.stderr)
        best = {name: max(best[name], speed[name]) for name in systems}
    name = f"tokens/s of {len(prompts)} questions: AR / lm-eval hf, best batch of each"
    return [bars.at_least(name, best["AR"] / best["hf"], 2)]


def _generate(model: Checkpoint, work: Sequence[fluid_model.Request]) -> Callable[[], int]:
    return lambda: generate(model, work)


PARTS = {"floor": floor, "slots": slots, "busy": busy, "text": text, "batches": batches}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.floor", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a folder, GGUF file or hub id (smollm2-135m)")
    parser.add_argument("--format", choices=FORMATS, action="append", help="formats to measure; default: all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one run: whether it works")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of which the median; default: 5")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to measure; default: all")
    options = parser.parse_args(arguments)
    models = {name: fluid_model.load(options.model, device="cpu", dtype=name) for name in options.format or FORMATS}
    case = Case(options.model, models, 1 if options.quick else options.runs)
    kinds = {model.backbone.forward_choice for model in models.values()}
    print(f"{torch.get_num_threads()} threads; " + "; ".join(f"{c.kind} ({c.reason})" for c in kinds), file=sys.stderr)
    results = [bar for name in options.only or PARTS for bar in PARTS[name](case)]
    print(bars.render(results, as_json=options.json))
    return 0 if all(bar.ok is not False for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
