"""Forwards beside their floor, tokens a second beside AR's and `generate`'s, and memory.

A forward here is what the engine does with one: places and mask, the layers, the logits of all slots fed. Its floor is
the time to read all weights and the rows' keys and values once, at the speed at which the device copies memory.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import fluid_model
from fluid_model import ArSettings, Checkpoint, Engine, Request
from fluid_model.engine.strategy import Feed
from fluid_model.forward import attention_masks
from fluid_model.forward.kv_cache import KVCache

from .. import bars, clock
from .plan import Bench, Bounds, GpuPlan

SLOTS = (8, 16, 32, 64)
"""Slots a row of FLUID's forwards."""
BOUNDS: Bounds = {
    "AR forward / floor": {1: (bars.at_most, 1.2)},
    "FLUID forward / AR forward, 8 slots a row": {1: (bars.at_most, 1.3), 8: (bars.at_most, 1.3)},
    "FLUID forward / AR forward, 16 slots a row": {1: (bars.at_most, 1.3)},
    "FLUID forward / AR forward, 32 slots a row": {1: (bars.at_most, 1.3)},
    "FLUID forward / AR forward, 64 slots a row": {1: (bars.at_most, 1.3)},
    "tokens/s, ours / AR": {1: (bars.at_least, 2.3), 64: (bars.at_least, 1.34)},
    "tokens/s, AR / generate": {1: (bars.at_least, 2.0), 32: (bars.at_least, 1.5)},
}
"""By what is measured and how many rows share a forward: a forward of FLUID's may have 64 slots in all."""
GENERATE = (1, 32)
"""Rows at which transformers' own decoding is measured too."""


def measure(bench: Bench) -> None:
    """All of it, for every number of rows; on CUDA with forwards launched call by call, then captured and replayed."""
    captured = bench.plan.device.type == "cuda"
    for on in (False, True) if captured else (False,):
        bench.backbone.capture(on=on)
        labelled = replace(bench, note="" if on == captured else ", not captured")
        for part in (forwards, speeds, timeline, memory):
            for rows in bench.plan.concurrency:
                part(labelled, rows)
    bench.backbone.capture(on=False)


@torch.inference_mode()
def forwards(bench: Bench, rows: int) -> None:
    """A forward of AR's and of FLUID's rows behind `context` tokens, beside its floor."""
    plan, device, put = bench.plan, bench.plan.device, bench.put
    cache = bench.backbone.cache(rows, plan.context + max(SLOTS))
    ids = torch.randint(plan.vocabulary, (1, plan.context), device=device)
    bench.backbone.forward(ids, cache.set_write_positions(0, [0], plan.context, device), cache)
    cache.broadcast_prefix(0, 1, rows - 1, plan.context)
    column = cache.nbytes / cache.rows / cache.columns  # bytes of a row's token
    floor = (bench.read + rows * (plan.context + 1) * column) / bench.bandwidth
    ar = Feed(torch.zeros(rows, 1, dtype=torch.long, device=device), [1] * rows, ["commit"] * rows)
    feeds = [ar, *(fluid_feed(bench.checkpoint, rows, slots) for slots in SLOTS)]
    plain, *fans = (clock.median(partial(once, bench, cache, feed), device, plan.forwards) for feed in feeds)
    put("floor of a forward, ms", rows, 1000 * floor)
    put("AR forward, ms", rows, 1000 * plain)
    put("AR forward / floor", rows, plain / floor)
    for slots, took in zip(SLOTS, fans, strict=True):
        put(f"FLUID forward, {slots} slots a row, ms", rows, 1000 * took)
    for slots, took in zip(SLOTS, fans, strict=True):
        put(f"FLUID forward / AR forward, {slots} slots a row", rows, took / plain)


def fluid_feed(checkpoint: Checkpoint, rows: int, slots: int) -> Feed:
    """Rows of FLUID: a quarter of the slots are tokens, each with a fan of three masks behind it."""
    assert checkpoint.mask_id is not None
    tokens, device = slots // 4, checkpoint.backbone.device
    anchor = torch.tensor([*range(tokens), *(at for at in range(tokens) for _ in range(3))], device=device)
    step = torch.tensor([0] * tokens + [1, 2, 3] * tokens, device=device)
    ids = torch.where(step > 0, checkpoint.mask_id, anchor)
    ids, anchor, step = (each.repeat(rows, 1) for each in (ids, anchor, step))
    return Feed(ids, [slots] * rows, ["round"] * rows, intervals=attention_masks.mask_blocks(anchor, step))


def once(bench: Bench, cache: KVCache, feed: Feed) -> None:
    """One forward as the engine makes it, and the logits of its slots."""
    lengths, device = [bench.plan.context] * len(feed.widths), bench.plan.device
    reading = cache.set_write_positions(0, lengths, feed.ids.shape[1], device, feed.widths, feed.intervals)
    bench.backbone.logits(bench.backbone.forward(feed.ids, reading, cache))


def prompts(plan: GpuPlan, rows: int) -> list[tuple[int, ...]]:
    """Random ids, alike but for the last: `context` of them each."""
    ids = torch.randint(plan.vocabulary, (plan.context,), generator=torch.Generator().manual_seed(1)).tolist()
    return [(*ids[:-1], row) for row in range(rows)]


Tally = Counter[str]
"""What a system did. tokens: written, of all rows.  calls: of the model.  rounds: forwards of a row, and slots: fed in
them, summed over rows.
"""


def write(engine: Engine, plan: GpuPlan, new: int, first: int = 0) -> Tally:
    """Let all rows write until the first of them has `new` tokens.  first: the number of the first row's answer."""
    asked = [Request(str(n), ids, new, seed=first + n) for n, ids in enumerate(prompts(plan, engine.batch_size))]
    answer = next(engine.generate(asked))
    rows = engine._rows  # that go on
    traces = [answer.trace, *map(rows.trace, range(len(rows)))]
    return Counter(
        tokens=len(answer.ids) + int(rows.lengths[: len(rows)].sum()),
        calls=engine.calls,
        rounds=sum(sum(trace.forwards.values()) for trace in traces),
        slots=sum(trace.slots for trace in traces),
    )


def ar(bench: Bench, rows: int, new: int) -> Tally:
    """AR in this engine."""
    return write(fluid_model.engine_for(bench.checkpoint, ArSettings(), rows), bench.plan, new)


def ours(bench: Bench, rows: int, new: int) -> Tally:
    """FLUID in this engine. Of few rows several answers, since some of them are easier to draft than others."""
    turns = range(0, max(rows, bench.plan.answers), rows)
    return sum((write(bench.fluid(rows), bench.plan, new, first) for first in turns), Counter())


def generate(bench: Bench, rows: int, new: int) -> Tally:
    """transformers' own greedy decoding."""
    ids = torch.tensor(prompts(bench.plan, rows), device=bench.plan.device)
    out = bench.checkpoint.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return Counter(tokens=out.numel() - ids.numel())


def speeds(bench: Bench, rows: int) -> None:
    """Tokens a second once prompts are read: what more tokens take beside answers of one. Systems take turns."""
    plan, put, one = bench.plan, bench.put, 1
    systems = {"AR": ar, "ours": ours} | ({"generate": generate} if rows in GENERATE else {})
    took: dict[tuple[str, int], list[float]] = {(name, new): [] for name in systems for new in (one, plan.tokens)}
    did: dict[tuple[str, int], Tally] = {}
    for _ in range(1 + plan.runs):
        for name, new in took:
            passed, did[name, new] = clock.took(partial(systems[name], bench, rows, new), plan.device)
            took[name, new].append(passed)
    more = {name: did[name, plan.tokens] - did[name, one] for name in systems}
    seconds = {name: _less(took[name, plan.tokens], took[name, one]) for name in systems}
    speed = {name: _ratio(more[name]["tokens"], seconds[name]) for name in systems}
    for name in systems:
        put(f"tokens/s, {name}", rows, speed[name])
    put("tokens/s, ours / AR", rows, _ratio(speed["ours"], speed["AR"]))
    if "generate" in systems:
        put("tokens/s, AR / generate", rows, _ratio(speed["AR"], speed["generate"]))
    for name in ("AR", "ours"):
        each = _ratio(seconds[name], more[name]["calls"])
        put(f"a round of {name}, all in all, ms", rows, None if each is None else 1000 * each)
    put("tokens a row and round, ours", rows, _ratio(more["ours"]["tokens"], more["ours"]["rounds"]))
    put("slots a row and round, ours", rows, _ratio(more["ours"]["slots"], more["ours"]["rounds"]))


def _less(long: list[float], short: list[float]) -> float | None:
    """By how much the medians differ, the first runs aside; None where that cannot be told from chance."""
    difference = statistics.median(long[1:]) - statistics.median(short[1:])
    return difference if difference > 0 else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def timeline(bench: Bench, rows: int) -> None:
    """Where FLUID's time goes, prompts included: each part waits for the device, so that none is told as another."""
    plan, engine, spent = bench.plan, bench.fluid(rows), defaultdict[str, float](float)
    parts = {"the model": (engine.backbone, "forward"), "acceptance": (engine.strategy, "_predict")}
    for part, (owner, name) in parts.items():
        setattr(owner, name, partial(_spend, spent, part, getattr(owner, name), plan.device))
    try:
        seconds, _ = clock.took(partial(write, engine, plan, plan.tokens), plan.device)
    finally:
        for owner, name in parts.values():
            delattr(owner, name)
    for part in parts:
        bench.put(f"share of time, {part}", rows, spent[part] / seconds)
    bench.put("share of time, the host", rows, 1 - sum(spent.values()) / seconds)


def _spend(
    spent: defaultdict[str, float], part: str, call: Callable[..., Any], device: torch.device, *words: Any
) -> Any:
    took, result = clock.took(partial(call, *words), device)
    spent[part] += took
    return result


def memory(bench: Bench, rows: int) -> None:
    """Most memory that was in use while FLUID's rows wrote, over that of weights and cache."""
    device, peak = bench.plan.device, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        engine = bench.fluid(rows)
        write(engine, bench.plan, bench.plan.tokens)
        peak = torch.cuda.max_memory_allocated(device) / (bench.held + engine.cache_bytes)
    bench.put("peak memory, ours / weights + KV", rows, peak)
