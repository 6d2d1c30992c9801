"""Training steps of FLUID's stages on the same model: block masks beside dense ones, many taus beside one.

Stage 1 trains LoRA with gradient checkpointing on rows of `context` tokens laid out with fans, about five slots a
token; stage 2 trains K-heads over the frozen model. Block masks are compiled and run on CUDA alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from fluid_model.train.row_layouts import AllMaskLayout, Example, HybridLayout
from fluid_model.train.stages import FLEX_MULTIPLE, Batch, HorizonCalibration, collate, row_loss

from .. import bars, clock
from .plan import Bench, Bounds

BOUNDS: Bounds = {
    "training step, dense masks / block masks": {0: (bars.at_least, 2.0)},
    "training, loss of block masks - of dense ones": {0: (bars.at_most, 0.01)},
    "training, peak memory, block masks, GB": {0: (bars.at_most, 80.0)},
    "stage 2, five taus / one": {0: (bars.at_most, 1.1)},
}
K_MAX = 16
RANK = 16
TAUS = (0.5, 1.0, 2.0, 2.8, 4.0)
WEIGHTS = (1.0, 1.0)


@dataclass(frozen=True)
class TrainingStep:
    """seconds: of a step.  loss: of the first one, before anything moved.  peak: bytes, None where nobody counts."""

    seconds: float
    loss: float
    peak: int | None


def measure(bench: Bench) -> None:
    """Stage 1 by both masks, then stage 2. What a device's memory cannot hold is not measured."""
    plan, put = bench.plan, bench.measurements.put
    model, mask = bench.checkpoint.model, bench.checkpoint.mask_id
    assert mask is not None
    batch = laid(bench, HybridLayout(mask, K_MAX, range(1, plan.vocabulary - 1)))
    put("training, slots a token", 0, batch["ids"].shape[1] / plan.context)
    steps = {}
    for name in ("flex_attention", "sdpa") if plan.device.type == "cuda" else ("sdpa",):
        with attention(model, name):
            steps[name] = stage_one(bench, batch)
    dense, block = steps.get("sdpa"), steps.get("flex_attention")
    for name, step in (("dense masks", dense), ("block masks", block)):
        put(f"training, tokens/s, {name}", 0, None if step is None else plan.context / step.seconds)
        peak = None if step is None else step.peak
        put(f"training, peak memory, {name}, GB", 0, None if peak is None else peak / 1e9)
    both = dense is not None and block is not None
    ratio = dense.seconds / block.seconds if dense and block else None
    put("training step, dense masks / block masks", 0, ratio)
    put("training, loss of block masks - of dense ones", 0, abs(dense.loss - block.loss) if dense and block else None)
    with attention(model, "flex_attention" if both else "sdpa"):
        fans = laid(bench, AllMaskLayout(mask, K_MAX))
        one, five = (stage_two(bench, fans, taus) for taus in ((TAUS[3],), TAUS))
    put("stage 2, five taus / one", 0, five / one)


def laid(bench: Bench, layout: HybridLayout | AllMaskLayout) -> Batch:
    """One row of random tokens, laid out, on the device."""
    plan = bench.plan
    ids = torch.randint(1, plan.vocabulary - 1, (plan.context,), generator=torch.Generator().manual_seed(3)).tolist()
    row = layout.build(Example(tuple(ids), ((plan.context // 4, plan.context),)), random.Random(0), 0)
    return {name: value.to(plan.device) for name, value in collate([row], FLEX_MULTIPLE).items()}


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within, the model reads by another implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def stage_one(bench: Bench, batch: Batch) -> TrainingStep | None:
    """A step of LoRA: forward, backward, AdamW. None if memory does not suffice."""
    plan, inner = bench.plan, bench.checkpoint.model
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(inner, lora)
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    inner.enable_input_require_grads()
    model.train()
    try:
        return _timed(plan.device, model, partial(_loss, model, inner, batch), plan.forwards)
    except torch.OutOfMemoryError:
        return None
    finally:
        model.unload()
        inner.gradient_checkpointing_disable()
        inner.disable_input_require_grads()
        inner.eval()


def _loss(model: Any, inner: PreTrainedModel, batch: Batch) -> Tensor:
    return row_loss(model, inner, batch, WEIGHTS)[0]


def stage_two(bench: Bench, batch: Batch, taus: tuple[float, ...]) -> float:
    """Seconds of a step of the K-heads of so many taus."""
    horizons = HorizonCalibration(bench.checkpoint.model, K_MAX, taus).to(bench.plan.device)
    step = _timed(bench.plan.device, horizons, lambda: horizons(**batch)["loss"], bench.plan.forwards)
    return step.seconds


def _timed(device: torch.device, module: nn.Module, loss: Callable[[], Tensor], runs: int) -> TrainingStep:
    """Steps of what moves in a module."""
    moving = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-4)
    losses: list[Tensor] = []

    def step() -> None:
        losses.append(loss())
        losses[-1].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = clock.median(step, device, runs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return TrainingStep(seconds, float(losses[0].detach()), peak)
