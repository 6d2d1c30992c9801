"""How far text in bfloat16 is that of AR, what batches change, and what float32 costs, which ties neither to luck.

Of tiny-fluid, since random weights have no margins worth the name: the rounding of a device's kernels is what is looked
at, and kernels are chosen by the number of slots of a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

import fluid_model
from fluid_model import ArSettings, Checkpoint, Engine, FluidSettings, Generation, Request
from fluid_model.forward.kv_cache import KVCache

from .. import clock, replay
from ..prompts import mini
from .plan import Bench, Bounds

BOUNDS: Bounds = {}
PROMPTS, QUICK_PROMPTS = 200, 4
DTYPES = ("bfloat16", "float32")
SLOTS = 16
"""Of the one shape: AR feeds one."""

Answers = Mapping[str, Generation]


@dataclass(frozen=True)
class DtypeAnswers:
    """Answers in one dtype, by rows and by decoder, and seconds of FLUID's at the most rows."""

    answers: dict[tuple[int, str], Answers]
    seconds: float


def measure(bench: Bench) -> None:
    """Texts at every number of rows, in both dtypes."""
    plan, put = bench.plan, bench.measurements.put
    count = PROMPTS if plan.is_whole else QUICK_PROMPTS
    seconds = {}
    for dtype in DTYPES:
        checkpoint = _tiny(bench, dtype)
        work = requests(checkpoint, count, min(plan.tokens, replay.NEW))
        written = write(checkpoint, work, plan.concurrency)
        alone = written.answers[plan.concurrency[0], "AR"]
        for rows in plan.concurrency:
            ar, ours = (written.answers[rows, name] for name in ("AR", "ours"))
            margins = [margin(checkpoint, r, ar[r.key], ours[r.key]) for r in work if ar[r.key].ids != ours[r.key].ids]
            put(f"texts equal to AR's, {dtype}", rows, 1 - len(margins) / len(work))
            put(f"widest margin where they part, nats, {dtype}", rows, max(margins, default=0.0))
            same = sum(ar[key].ids == alone[key].ids for key in ar)
            put(f"AR's texts equal to those of the first batch, {dtype}", rows, same / len(work))
        seconds[dtype] = written.seconds
    put("time of float32 / bfloat16, tiny-fluid", plan.concurrency[-1], seconds["float32"] / seconds["bfloat16"])
    one_shape(bench, count)


def one_shape(bench: Bench, count: int) -> None:
    """AR in bfloat16 with all forwards of one shape: its texts at every number of rows; what that costs at the most."""
    plan, put, most = bench.plan, bench.measurements.put, max(bench.plan.concurrency)
    checkpoint = _tiny(bench, "bfloat16")
    work = requests(checkpoint, count, min(plan.tokens, replay.NEW))
    columns = max(len(request.prompt) + request.max_new_tokens for request in work) + 1 + SLOTS
    answers, seconds = list[Answers](), list[float]()
    for only in (None, (most, SLOTS, columns)):
        checkpoint.backbone.capture(on=only is not None, only=only)
        for rows in plan.concurrency:
            engine = fluid_model.engine_for(checkpoint, ArSettings(), rows)
            passed, generations = clock.took(partial(_all, engine, work), plan.device)
            seconds.append(passed)
            if only is not None:
                answers.append({answer.key: answer for answer in generations})
    for rows, batch_answers in zip(plan.concurrency, answers, strict=True):
        same = sum(batch_answers[key].ids == answers[0][key].ids for key in batch_answers)
        put("AR's texts equal to those of the first batch, bfloat16, one shape", rows, same / len(work))
    put("time of one shape / of many, AR, tiny-fluid", most, seconds[-1] / seconds[len(plan.concurrency) - 1])


def _tiny(bench: Bench, dtype: str) -> Checkpoint:
    folder = str(replay.ROOT / "checkpoints" / "tiny-fluid")
    return fluid_model.load(folder, device=bench.plan.device.type, dtype=dtype)


def requests(checkpoint: Checkpoint, count: int, new: int) -> list[Request]:
    """The mini suite's word problems."""
    ids = (tuple(checkpoint.tokenizer(prompt)["input_ids"]) for prompt in mini(count))
    return [Request(str(n), prompt, new) for n, prompt in enumerate(ids)]


def write(checkpoint: Checkpoint, work: list[Request], concurrency: tuple[int, ...]) -> DtypeAnswers:
    """Answers of AR and of FLUID at every number of rows."""
    answers: dict[tuple[int, str], Answers] = {}
    seconds = 0.0
    both: dict[str, ArSettings | FluidSettings] = {"AR": ArSettings(), "ours": FluidSettings()}
    for rows in concurrency:
        for name, settings in both.items():
            engine = fluid_model.engine_for(checkpoint, settings, rows)
            seconds, generations = clock.took(partial(_all, engine, work), checkpoint.backbone.device)
            answers[rows, name] = {answer.key: answer for answer in generations}
    return DtypeAnswers(answers, seconds)


def _all(engine: Engine, work: list[Request]) -> list[Generation]:
    return list(engine.generate(work))


@torch.inference_mode()
def margin(checkpoint: Checkpoint, request: Request, ar: Generation, ours: Generation) -> float:
    """By how much AR's token is likelier than the next likeliest where two texts part, nats, read in one forward."""
    pairs = enumerate(zip(ar.ids, ours.ids, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(ar.ids), len(ours.ids)))
    ids = torch.tensor([[*request.prompt, *ar.ids[:place]]], device=checkpoint.backbone.device)
    cache = KVCache(1, ids.shape[1])
    reading = cache.set_write_positions(0, [0], ids.shape[1], checkpoint.backbone.device)
    logits = checkpoint.backbone.logits(checkpoint.backbone.forward(ids, reading, cache)[0, -1])
    first, second = logits.log_softmax(-1).topk(2).values.tolist()
    return float(first - second)
