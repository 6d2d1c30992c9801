"""Decoding speed, side by side in one process: `python -m bench.decode [--model FOLDER] [--json] [--quick]`.

Systems take turns on the same prompts and the median of their runs counts, so that a machine with other work slows all
of them alike. Greedy, fp32. tiny-fluid answers prompts of the mini suite that were not trained on; another FLUID
answers GSM8K's questions, as a user turn where it has a chat template.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import fluid_model
from fluid_eval.common.paths import resource
from fluid_eval.running.backend_pool import gguf_arguments
from fluid_model import ArSettings, Checkpoint, FluidSettings, Generation, Request
from fluid_model.checkpoints.gguf_files import gguf_of
from fluid_model.forward.backbone import Backbone
from fluid_model.settings import DecoderSettings

from . import bars
from .bars import Bar
from .clock import Speeds, side_by_side, step_times
from .prompts import mini, real

REFERENCE = FluidSettings(rounds="reference")
CACHED = FluidSettings(rounds="reference", min_horizon=4)
"""The public samplers, (c) and (b) of docs/decoders.md: uncached, strides of 1 at least; cached, of 4 at least."""
CHEAP = FluidSettings(slot_budget=100_000, min_horizon=4)
"""Ours where slots cost nothing: the fewest forwards."""
NEW = 160
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (250, 1000, 4000)
"""Tokens of prompts that grow."""
STOPS = ("Question:", "</s>", "<|im_end|>")
TINY = resource("checkpoints") / "tiny-fluid"


@dataclass(frozen=True)
class Workload:
    """How much is measured. alone: prompts at batch 1.  many: prompts together, `waves` times the batch at most.
    runs: of which the median.  seconds: of turns beside AR, at least: other work on the machine then meets both alike.
    new: tokens of an answer at most.  source: of the prompts.
    """

    alone: int = 24
    many: int = 200
    waves: int = 12
    real: int = 50
    runs: int = 5
    seconds: float = 40.0
    new: int = NEW
    source: Callable[[int], list[str]] = mini


def as_asked(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[str]:
    """Each prompt as the only user turn where the tokenizer has a chat template, else as it is."""
    tokenizer = checkpoint.tokenizer
    if not tokenizer.chat_template:
        return list(prompts)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def requests(checkpoint: Checkpoint, prompts: Sequence[str], new_tokens: int = NEW) -> list[Request]:
    """One request a prompt, named by its place, see `as_asked`."""
    tokenizer = checkpoint.tokenizer
    special = not tokenizer.chat_template
    texts = as_asked(checkpoint, prompts)
    ids = [tuple(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
    return [Request(str(n), prompt, new_tokens) for n, prompt in enumerate(ids)]


def write(
    checkpoint: Checkpoint, decoder: DecoderSettings, work: Sequence[Request], batch: int
) -> dict[str, Generation]:
    """Answers by key."""
    return {g.key: g for g in fluid_model.engine_for(checkpoint, decoder, batch).generate(work)}


def tokens(answers: Mapping[str, Generation]) -> int:
    """Tokens of all answers, before their ends."""
    return sum(len(answer.ids) for answer in answers.values())


def forwards(answers: Mapping[str, Generation]) -> int:
    """Forwards a row took part in, summed over rows."""
    return sum(sum(answer.trace.forwards.values()) for answer in answers.values())


def writer(checkpoint: Checkpoint, decoder: DecoderSettings, work: Sequence[Request], batch: int) -> Callable[[], int]:
    """A call that writes all answers and returns their tokens."""
    return lambda: tokens(write(checkpoint, decoder, work, batch))


def generate(checkpoint: Checkpoint, work: Sequence[Request]) -> int:
    """transformers' own greedy decoding, a prompt at a time. Returns tokens written."""
    written = 0
    for request in work:
        ids = torch.tensor([request.prompt])
        out = checkpoint.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False,
            eos_token_id=list(checkpoint.end_ids), pad_token_id=checkpoint.end_ids[0],
        )  # fmt: skip
        fresh = out[0, len(request.prompt) :].tolist()
        written += next((i for i, token in enumerate(fresh) if token in checkpoint.end_ids), len(fresh))
    return written


def lm_eval_hf(model: str, batch: int) -> Any:
    """lm-eval's `hf` backend over a folder or a GGUF file, float32."""
    from lm_eval.models.huggingface import HFLM

    file = gguf_of(model)
    source = {"pretrained": model} if file is None else gguf_arguments(file)
    return HFLM(**source, device="cpu", dtype="float32", batch_size=batch)


def lm_eval_writer(model: str, texts: Sequence[str], batch: int, new_tokens: int = NEW) -> Callable[[], int]:
    """A call that answers texts by lm-eval's `hf` backend and returns tokens written."""
    from lm_eval.api.instance import Instance

    backend = lm_eval_hf(model, batch)
    options = {"until": [], "max_gen_toks": new_tokens, "do_sample": False}
    work = [Instance("generate_until", {}, (text, dict(options)), n) for n, text in enumerate(texts)]

    def call() -> int:
        answers = backend.generate_until(work, disable_tqdm=True)
        return sum(len(backend.tok_encode(answer, add_special_tokens=False)) for answer in answers)

    return call


def alone(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """A prompt at a time."""
    work = requests(checkpoint, plan.source(plan.alone), plan.new)
    decoders = {"AR": ArSettings(), "reference": REFERENCE, "ours": FluidSettings()}
    systems = {name: writer(checkpoint, decoder, work, 1) for name, decoder in decoders.items()}
    systems["generate"] = lambda: generate(checkpoint, work)
    speed = side_by_side(systems, plan.runs)
    print("Batch 1, tokens/s: " + ", ".join(f"{name} {speed[name]:,.0f}" for name in speed.runs), file=sys.stderr)
    return [
        bars.at_least("tokens/s at batch 1: ours / generate", speed.ratio("ours", "generate"), 5),
        bars.at_least("tokens/s at batch 1: ours / reference decoder", speed.ratio("ours", "reference"), 3),
        Bar("tokens/s at batch 1: ours / AR in this engine", round(speed.ratio("ours", "AR"), 3), "", None),
    ]


def fewer(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Forwards, and how few they could be."""
    work = requests(checkpoint, mini(plan.many))
    systems = {"reference": (REFERENCE, 8), "reference, stride 4 at least": (CACHED, 8), "ours": (CHEAP, 1)}
    systems |= {"ours here": (FluidSettings(), 1), "AR": (ArSettings(), 32)}
    written = {name: write(checkpoint, decoder, work, batch) for name, (decoder, batch) in systems.items()}
    assert checkpoint.head is not None
    stride = checkpoint.head.k_max
    oracle = sum(1 + -(-len(answer.ids) // stride) for answer in written["AR"].values())  # a prompt, then whole strides
    rows = [
        (name, f"{forwards(answers):,}", f"{tokens(answers) / forwards(answers):.2f}")
        for name, answers in written.items()
    ]
    rows.append(("oracle: every draft right", f"{oracle:,}", f"{tokens(written['AR']) / oracle:.2f}"))
    print(bars.table(["", "forwards", "tokens/forward"], rows), file=sys.stderr)
    least = min(forwards(answers) for name, answers in written.items() if name.startswith("reference"))
    ratio, here = least / forwards(written["ours"]), least / forwards(written["ours here"])
    return [
        bars.at_least("forwards: the better reference decoder / ours, slots free", ratio, 2.5),
        Bar("forwards: the better reference decoder / ours, slots priced here", round(here, 3), "", None),
    ]


def together(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Many prompts at every batch; ours must cost nobody speed."""
    prompts, is_tiny = plan.source(plan.many), checkpoint.folder == TINY
    speeds: dict[int, Speeds] = {}
    results = []
    for batch in BATCHES:
        work = requests(checkpoint, prompts[: plan.waves * batch], plan.new)
        systems = {"AR": writer(checkpoint, ArSettings(), work, batch)}
        systems["ours"] = writer(checkpoint, FluidSettings(), work, batch)
        speed = speeds[batch] = side_by_side(systems, plan.runs, plan.seconds)
        results.append(
            bars.at_least(f"tokens/s at batch {batch}: ours / AR in this engine", speed.ratio("ours", "AR"), 0.97)
        )
    rows = [(name, *(f"{speeds[batch][name]:,.0f}" for batch in BATCHES)) for name in ("AR", "ours")]
    print(bars.table(["tokens/s at batch", *map(str, BATCHES)], rows), file=sys.stderr)
    return [*results, *beside_hf(checkpoint, plan)] if is_tiny else results


def beside_hf(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """AR beside lm-eval's `hf`, each at the better of the two largest batches."""
    prompts = plan.source(plan.many)
    work, best = requests(checkpoint, prompts, plan.new), {"AR": 0.0, "hf": 0.0}
    for batch in BATCHES[-2:]:
        systems = {"AR": writer(checkpoint, ArSettings(), work, batch), "hf": lm_eval_writer(str(TINY), prompts, batch)}
        speed = side_by_side(systems, plan.runs)
        best = {name: max(best[name], speed[name]) for name in best}
    print("tokens/s, best batch: " + ", ".join(f"{name} {value:,.0f}" for name, value in best.items()), file=sys.stderr)
    return [bars.at_least("AR in this engine / lm-eval hf, best batch each", best["AR"] / best["hf"], 2)]


def overhead(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Time of full steps that is not spent inside the model (its layers, the vocabulary projection, the K-head): one
    row's as a share, 64 rows' in milliseconds. Stop strings are GSM8K's.
    """
    is_tiny, full = checkpoint.folder == TINY, BATCHES[-1]
    work = [replace(request, stops=STOPS) for request in requests(checkpoint, plan.source(2 * full), plan.new)]
    policies = {"": FluidSettings(), ", slot budget 64": FluidSettings(slot_budget=64)}
    # 1) one row
    results = []
    for words, decoder in policies.items():
        steps = steps_of(checkpoint, decoder, work[: plan.alone], 1, plan.runs)
        share = statistics.median(beside / (beside + inside) for beside, inside in steps)
        name = f"host time over a step's, batch 1{words}"
        results.append(Bar(name, round(share, 3), "", None) if is_tiny else bars.at_most(name, share, 0.05))
    # 2) as many as there may be: the tiny model's, whose steps are many; a larger model's host time is the same
    if is_tiny:
        for words, decoder in policies.items():
            steps = steps_of(checkpoint, decoder, work, full, plan.runs)
            milliseconds = 1000 * statistics.median(beside for beside, _ in steps)
            results.append(bars.at_most(f"host time of a step, ms, batch {full}{words}", milliseconds, 0.3))
    return results


def steps_of(
    checkpoint: Checkpoint, decoder: DecoderSettings, work: Sequence[Request], batch: int, runs: int
) -> list[tuple[float, float]]:
    """Seconds of full steps outside and inside the model, see `clock.step_times`."""
    parts = {"forward": checkpoint.backbone, "logits": checkpoint.backbone, "stride": checkpoint.head}
    return step_times(writer(checkpoint, decoder, work, batch), parts, batch, runs)


def memory(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Peak of live tensors over weights and cache, by torch's account; what weights are laid out into counts."""
    from torch.profiler import ProfilerActivity, profile

    work = requests(checkpoint, mini(32))
    fresh = replace(checkpoint, backbone=Backbone(checkpoint.model, checkpoint.backbone.adapter))
    engine = fluid_model.engine_for(fresh, FluidSettings(slot_budget=checkpoint.backbone.slot_budget), 32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        list(engine.generate(work))
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    weights = sum(p.numel() * p.element_size() for p in checkpoint.model.parameters())
    cache = engine.cache_bytes
    return [bars.at_most("peak memory over weights + KV, batch 32", (weights + peak) / (weights + cache), 1.3)]


def identical(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Greedy text is AR's; where it is not, by what margin AR chose its token."""
    prompts = [*mini(plan.many), *real(plan.real)]
    work = requests(checkpoint, prompts)
    expected = write(checkpoint, ArSettings(), work, 32)
    results = []
    for batch in (1, 32):
        answers = write(checkpoint, FluidSettings(), work, batch)
        other = [key for key in expected if answers[key].ids != expected[key].ids]
        for key in other:
            print(f"batch {batch}, prompt {key}: {margin(checkpoint, work[int(key)], expected[key], answers[key])}")
        name = f"greedy text identical to AR, {len(work)} prompts, batch {batch}, %"
        results.append(bars.at_least(name, 100 * (1 - len(other) / len(work)), 100))
    return results


@torch.inference_mode()
def margin(checkpoint: Checkpoint, request: Request, expected: Generation, other: Generation) -> str:
    """The first place where two answers part, and how much likelier AR's token is there."""
    at = next(i for i, pair in enumerate(zip(expected.ids, other.ids, strict=False)) if pair[0] != pair[1])
    ids = torch.tensor([[*request.prompt, *expected.ids[:at]]])
    logits = checkpoint.model(input_ids=ids).logits[0, -1]
    return f"parts at token {at}, by {float(logits[expected.ids[at]] - logits[other.ids[at]]):.2g} nats"


def growth(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Milliseconds a token where the work grows."""
    return ten_times(checkpoint, plan) if checkpoint.folder == TINY else longer(checkpoint, plan)


def ten_times(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Milliseconds a token where the work grows tenfold."""
    short = mini(20)
    long = [prompt * 10 for prompt in short]
    cases = {
        "20 problems, batch 4": (short, 4), "200 problems, batch 4": (mini(200), 4),
        "prompts ten times as long, batch 4": (long, 4), "200 problems, batch 40": (mini(200), 40),
    }  # fmt: skip
    speed = side_by_side(
        {
            name: writer(checkpoint, FluidSettings(), requests(checkpoint, prompts, 64), batch)
            for name, (prompts, batch) in cases.items()
        },
        max(1, plan.runs // 2),
    )
    return [Bar(f"ms/token, {name}", round(1000 / speed[name], 3), "", None) for name in cases]


def longer(checkpoint: Checkpoint, plan: Workload) -> list[Bar]:
    """Milliseconds a token, of the prompt and of the answer, where the prompt grows. One prompt at a time, GSM8K's
    questions behind one another; answers do not end before their limit.
    """
    endless = replace(checkpoint, end_ids=())
    ids = [token for request in requests(checkpoint, plan.source(100)) for token in request.prompt]
    lengths = [length for length in LENGTHS if length <= min(len(ids), checkpoint.backbone.window - plan.new)]
    decoders: dict[str, DecoderSettings] = {"AR": ArSettings(), "ours": FluidSettings()}
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for run in range(plan.runs + 1):  # the first warms up
        for (name, decoder), length, limit in product(decoders.items(), lengths, (1, 1 + plan.new)):
            work = [Request("", tuple(ids[:length]), limit)]
            started = time.perf_counter()
            write(endless, decoder, work, 1)
            if run:
                seconds.setdefault((name, length, limit), []).append(time.perf_counter() - started)
    results = []
    for name, length in product(decoders, lengths):
        first, all_ = (1000 * statistics.median(seconds[name, length, limit]) for limit in (1, 1 + plan.new))
        parts = {"prompt": first / length, "answer": (all_ - first) / plan.new}
        results += [
            Bar(f"{name}, prompt of {length:,} tokens: ms/token of the {part}", round(value, 2), "", None)
            for part, value in parts.items()
        ]
    return results


PARTS = {
    "forwards": fewer, "alone": alone, "together": together, "overhead": overhead, "memory": memory,
    "identical": identical, "growth": growth,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few prompts, one run: whether it works")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to measure; default: all")
    parser.add_argument("--model", type=Path, default=TINY, metavar="FOLDER", help="a FLUID; default: tiny-fluid")
    options = parser.parse_args(arguments)
    plan = Workload(alone=2, many=4, real=2, runs=1, seconds=0) if options.quick else Workload()
    if options.model != TINY:
        few = min(plan.alone, 4)
        plan = replace(plan, source=real, alone=few, many=min(plan.many, 64), waves=2, new=64)
    checkpoint = fluid_model.load(str(options.model), device="cpu", dtype="float32")
    print(f"slot budget {checkpoint.backbone.slot_budget}, {torch.get_num_threads()} threads", file=sys.stderr)
    results = [bar for name in options.only or PARTS for bar in PARTS[name](checkpoint, plan)]
    print(bars.render(results, as_json=options.json))
    return 0 if all(bar.ok is not False for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
