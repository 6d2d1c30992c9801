"""Decoding speed on one device at a 7B model's size: `python -m bench.gpu [--json] [--quick]`, in one table.

Weights are random, of openPangu-Embedded-7B's shape, so what FLUID's drafts are worth is replayed from a recording of
tiny-fluid (`--record` makes it anew). Needs torch, transformers and `fluid_model`. Clocks stay as they are found.

A forward here is what the engine does with one: places and mask, the layers, the logits of all slots fed. Its floor is
the time to read all weights and the rows' keys and values once, at the speed at which the device copies memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers

import fluid_model
from fluid_model import ArSettings, Checkpoint, ConfigError, Engine, FluidSettings, KHead, Request
from fluid_model.backbone import Backbone
from fluid_model.checkpoint import pick_device
from fluid_model.engine.cache import SlotCache
from fluid_model.engine.strategy import Feed
from fluid_model.masks import Fans

from . import bars, clock, replay
from .bars import Bar

SLOTS = (8, 16, 32, 64)
"""Slots a row of FLUID's forwards."""
BOUNDS = {
    "AR forward / floor": {1: (bars.at_most, 1.2)},
    "FLUID forward / AR forward, 8 slots a row": {1: (bars.at_most, 1.3), 8: (bars.at_most, 1.3)},
    "FLUID forward / AR forward, 16 slots a row": {1: (bars.at_most, 1.3)},
    "FLUID forward / AR forward, 32 slots a row": {1: (bars.at_most, 1.3)},
    "FLUID forward / AR forward, 64 slots a row": {1: (bars.at_most, 1.3)},
    "tokens/s, ours / AR": {1: (bars.at_least, 2.3), 64: (bars.at_least, 1.34)},
    "tokens/s, AR / generate": {1: (bars.at_least, 2.0), 32: (bars.at_least, 1.5)},
}
"""By what is measured and how many rows share a forward: a forward of FLUID's may have 64 slots in all."""
QUICK = {
    "layers": 2, "hidden": 64, "vocabulary": 8192, "context": 64, "tokens": 16, "answers": 2, "forwards": 5, "runs": 1,
}  # fmt: skip
GENERATE = (1, 32)
"""Rows at which transformers' own decoding is measured too."""


@dataclass(frozen=True)
class Plan:
    """The model, and how much is measured.

    context: tokens a row has read before.  tokens: to write.  answers: written by FLUID at least.  forwards, runs: of
    which the median.
    """

    device: torch.device
    concurrency: tuple[int, ...]
    layers: int = 34
    hidden: int = 4096
    vocabulary: int = 153376
    context: int = 1024
    tokens: int = 256
    answers: int = 8
    forwards: int = 15
    runs: int = 3

    def __post_init__(self) -> None:
        if self.hidden < 64 or self.hidden % 64:
            raise ConfigError(f"hidden={self.hidden} must be a multiple of 64")
        for name, least in (("layers", 1), ("context", 2), ("tokens", 2), ("runs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")

    @property
    def is_whole(self) -> bool:
        """Whether bars are for this to meet."""
        return self.device.type == "cuda" and (self.layers, self.hidden, self.vocabulary) == (34, 4096, 153376)

    @property
    def hardware(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


class Found:
    """What was measured, by what it is and how many rows share a forward (0: whatever their number)."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cells: dict[str, dict[int, Bar]] = {}

    def put(self, what: str, rows: int, measured: float | None) -> None:
        """measured: None where this machine cannot say."""
        name = f"{what}, {f'batch {rows}, ' if rows else ''}{self.plan.hardware}"
        bound = BOUNDS.get(what, {}).get(rows) if self.plan.is_whole else None
        if bound is None or measured is None:
            bar = Bar(name, None if measured is None else float(f"{measured:.4g}"), "", None)
        else:
            bar = bound[0](name, measured, bound[1])
        self.cells.setdefault(what, {})[rows] = bar

    @property
    def bars(self) -> list[Bar]:
        return [bar for cells in self.cells.values() for bar in cells.values()]

    def table(self) -> str:
        """One line for what is measured, one column for a number of rows."""
        columns = self.plan.concurrency
        lines = []
        for what, cells in self.cells.items():
            once = [_cell(cells[0])] if 0 in cells else []
            lines.append([what, *once, *(_cell(cells.get(rows)) for rows in columns[len(once) :])])
        return bars.table([self.plan.hardware, *(f"batch {rows}" for rows in columns)], lines)


def _cell(bar: Bar | None) -> str:
    if bar is None:
        return ""
    told = "not measured" if bar.measured is None else f"{bar.measured:g}"
    return told if bar.ok is None else f"{told} ({bar.bar}: {'yes' if bar.ok else '**no**'})"


class _Mute:
    """A tokenizer for random ids, which say nothing."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return ""


def build(plan: Plan) -> Checkpoint:
    """Random weights, made where they stay: bfloat16, or float32 on a CPU. Nothing ends its answers."""
    heads = max(4, plan.hidden // 128)
    config = transformers.LlamaConfig(
        hidden_size=plan.hidden, intermediate_size=plan.hidden * 25 // 8, num_hidden_layers=plan.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, vocab_size=plan.vocabulary, attention_bias=True,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1.6e7},
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    dtype = torch.float32 if plan.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with plan.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = KHead(plan.hidden, FluidSettings().max_horizon)
    backbone = Backbone(model)
    if backbone.written_out is None:
        raise ConfigError("this model's forward is not written out; see fluid_model.llama.fits")
    return Checkpoint(backbone, _Mute(), (), mask_id=plan.vocabulary - 1, head=head)


@dataclass(frozen=True)
class Bench:
    """What is measured with. bandwidth: of copies, bytes a second."""

    plan: Plan
    checkpoint: Checkpoint
    tape: replay.Tape
    bandwidth: float
    found: Found

    @property
    def backbone(self) -> Backbone:
        found: Backbone = self.checkpoint.backbone
        return found

    @property
    def read(self) -> int:
        """Bytes of all weights that a forward reads: of the embedding it reads a few rows."""
        return self.held - int(self.checkpoint.model.get_input_embeddings().weight.nbytes)

    @property
    def held(self) -> int:
        """Bytes of all weights."""
        return sum(int(weight.nbytes) for weight in self.checkpoint.model.parameters())

    def fluid(self, rows: int) -> Engine:
        """An engine whose rows are FLUID's, by the recording."""
        strategy = replay.Replay(self.checkpoint, FluidSettings(), self.tape)
        return Engine(self.backbone, self.checkpoint.tokenizer, self.checkpoint.end_ids, strategy, rows)


@torch.inference_mode()
def forwards(bench: Bench, rows: int) -> None:
    """A forward of AR's and of FLUID's rows behind `context` tokens, beside its floor."""
    plan, device, put = bench.plan, bench.plan.device, bench.found.put
    cache = SlotCache(rows, plan.context + max(SLOTS))
    ids = torch.randint(plan.vocabulary, (1, plan.context), device=device)
    bench.backbone.forward(ids, cache.aim(0, [0], plan.context, device), cache)
    cache.spread(0, 1, rows - 1, plan.context)
    column = cache.nbytes / rows / cache.columns  # bytes of a row's token
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
    return Feed(ids, [slots] * rows, ["round"] * rows, fans=Fans(anchor, step))


def once(bench: Bench, cache: SlotCache, feed: Feed) -> None:
    """One forward as the engine makes it, and the logits of its slots."""
    lengths, device = [bench.plan.context] * len(feed.widths), bench.plan.device
    reading = replace(cache.aim(0, lengths, feed.ids.shape[1], device), fans=feed.fans, widths=feed.widths)
    bench.backbone.logits(bench.backbone.forward(feed.ids, reading, cache))


def prompts(plan: Plan, rows: int) -> list[tuple[int, ...]]:
    """Random ids, alike but for the last: `context` of them each."""
    ids = torch.randint(plan.vocabulary, (plan.context,), generator=torch.Generator().manual_seed(1)).tolist()
    return [(*ids[:-1], row) for row in range(rows)]


Tally = Counter[str]
"""What a system did. tokens: written, of all rows.  calls: of the model.  rounds: forwards of a row, and slots: fed in
them, summed over rows.
"""


def write(engine: Engine, plan: Plan, new: int, first: int = 0) -> Tally:
    """Let all rows write until the first of them has `new` tokens.  first: the number of the first row's answer."""
    asked = [Request(str(n), ids, new, seed=first + n) for n, ids in enumerate(prompts(plan, engine.slots))]
    answer = next(engine.generate(asked))
    rows = engine._rows  # that go on
    traces = [answer.trace, *(row.trace for row in rows)]
    return Counter(
        tokens=len(answer.ids) + sum(len(row.ids) for row in rows),
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
    plan, put, one = bench.plan, bench.found.put, 1
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
    found = statistics.median(long[1:]) - statistics.median(short[1:])
    return found if found > 0 else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def memory(bench: Bench, rows: int) -> None:
    """Most memory that was in use while FLUID's rows wrote, over that of weights and cache."""
    device, peak = bench.plan.device, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        engine = bench.fluid(rows)
        write(engine, bench.plan, bench.plan.tokens)
        peak = torch.cuda.max_memory_allocated(device) / (bench.held + engine.cache_bytes)
    bench.found.put("peak memory, ours / weights + KV", rows, peak)


def measure(plan: Plan) -> Found:
    """All of it. Says so if this forward's logits are not those of transformers."""
    tape = replay.read(plan.vocabulary - 2)
    bandwidth = clock.copy_bandwidth(plan.device, plan.forwards)
    bench = Bench(plan, build(plan), tape, bandwidth, Found(plan))
    try:
        bench.backbone.probe()
    except ConfigError as error:
        print(error, file=sys.stderr)
    bench.found.put("copy bandwidth, GB/s", 0, bandwidth / 1e9)
    bench.found.put("weights a forward reads, GB", 0, bench.read / 1e9)
    bench.found.put("slot budget", 0, bench.backbone.slot_budget)
    for part in (forwards, speeds, memory):
        for rows in plan.concurrency:
            part(bench, rows)
    return bench.found


def told(plan: Plan) -> str:
    """What this is about, in one line."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    dtype = "float32" if plan.device.type == "cpu" else "bfloat16"
    return (
        f"{plan.hardware}, {versions}; random Llama of {plan.layers} layers, {plan.hidden} wide, {dtype}, "
        f"{plan.vocabulary:,} ids; rows of {plan.context} tokens, then {plan.tokens} written; clocks as found"
    )


def _numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(each) for each in text.split(","))
    if min(found) < 1:
        raise ValueError(text)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a small model, one run: whether it works")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--concurrency", type=_numbers, default=(1, 8, 32, 64), help="rows that write together")
    for name in ("layers", "hidden", "context", "tokens", "runs"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(Plan, name)}")
    parser.add_argument("--record", action="store_true", help=f"write {replay.FILE.name} anew, from tiny-fluid")
    options = vars(parser.parse_args(arguments))
    if options["record"]:
        print(f"{replay.FILE}: {replay.write():,} bytes")
        return 0
    said = {name: value for name in Plan.__dataclass_fields__ if isinstance(value := options.get(name), int)}
    sizes = {**(QUICK if options["quick"] else {}), **said}
    try:
        plan = Plan(pick_device(options["device"]), options["concurrency"], **sizes)
    except ConfigError as error:
        parser.error(str(error))
    print(told(plan), file=sys.stderr if options["json"] else sys.stdout)
    found = measure(plan)
    print(bars.told(found.bars, as_json=True) if options["json"] else found.table())
    return 0 if all(bar.ok is not False for bar in found.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
