"""K-head diagnostics: the predicted stride against the strides that verification would accept. `fluid-eval khead`.

Two measurements over a finished run's texts, both described in docs/khead.md:

1. Teacher forcing: every place of a text is fed with a mask block of full width anchored at it. This gives the longest
   stride whose draft tokens are all right, K* (training's target under tau), and the K-head's stride.
2. Simulation: draft policies decode the same texts from these numbers, without a model, and their costs are compared.

A stride of k is k tokens: the causal model's own next token, which is always accepted, and k - 1 draft tokens.
Source: FLUID (arXiv 2605.27387), dynamic horizon.

Legend: A anchors fed together, K widest stride (K_max), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.common.errors import ConfigError
from fluid_model.forward.attention_masks import mask_blocks
from fluid_model.forward.kv_cache import KVCache
from fluid_model.settings import FluidSettings
from fluid_model.train.losses import best_stride
from fluid_model.train.row_layouts import IGNORE

from ..running.worker import set_forward_time
from .acceptance import ALL
from .reopen import StoredText, open_run

ANCHORS = 16
"""Anchors measured in one forward."""


@dataclass(frozen=True)
class TextStrides:
    """Strides at every place of one text that a token follows, from the prompt's last token on. Lists of one length.

    predicted: the K-head's stride, 1..K.
    possible: longest stride that verification would accept, 1..K, as far as the text goes.
    best: K*, None without a tau.
    remaining: tokens of the text behind the place.
    """

    predicted: list[int]
    possible: list[int]
    best: list[int] | None
    remaining: list[int]


def khead_run(folder: Path) -> dict[str, Any]:
    """The content of khead.json for a finished run.

    Raises ConfigError if the run cannot be opened, has no K-head, or its text is not that of greedy AR.
    """
    # 1) open the run
    run = open_run(folder)
    checkpoint, decoder = run.checkpoint, run.spec.decoder
    if checkpoint.head is None or checkpoint.mask_id is None:
        raise ConfigError(f"{run.spec.model.path} has no K-head to measure")
    if not decoder.writes_ar_text or decoder.temperature:
        raise ConfigError("this text is not greedy AR's, which drafts are verified against; run with verify=true")
    # 2) slot budget and tau, which costs and K* depend on
    set_forward_time(checkpoint, replace(run.spec, decoder=FluidSettings()))
    budget = getattr(decoder, "slot_budget", None) or checkpoint.backbone.slot_budget
    manifest = checkpoint.manifest
    tau = manifest.tau[manifest.choose(run.spec.model.tau)] if manifest else None
    # 3) measure every text that holds a token or an end
    strides = [(text.task, measure_text(checkpoint, text, tau)) for text in run.texts if text.ids or text.ended]
    return {
        "model": run.spec.model.path,
        "tau": tau,
        "k_max": checkpoint.head.k_max,
        "positions": sum(len(text.remaining) for _, text in strides),
        "slot_budget": budget,
        "tasks": tables_by_task(strides, checkpoint.head.k_max, budget),
    }


@torch.inference_mode()
def measure_text(checkpoint: Checkpoint, text: StoredText, tau: float | None) -> TextStrides:
    """Teacher forcing: feed a text as decoding would, a mask block of K slots anchored at every place."""
    head, backbone = checkpoint.head, checkpoint.backbone
    assert head is not None
    ids = (*text.prompt, *text.ids, *checkpoint.end_ids[: text.ended])
    first, widest = len(text.prompt) - 1, head.k_max
    # 1) cache the prompt up to its last token
    cache = KVCache(1, len(ids) + ANCHORS * (widest + 1))
    if first:
        prompt = torch.tensor([ids[:first]], device=backbone.device)
        backbone.forward(prompt, cache.set_write_positions(0, [0], first, backbone.device), cache)
    # 2) A anchors a forward: compare each mask block's argmax with the tokens that follow
    predicted, possible, best = list[int](), list[int](), list[int]()
    for start in range(first, len(ids) - 1, ANCHORS):
        anchors = range(start, min(start + ANCHORS, len(ids) - 1))
        hidden, logits = _mask_block_forward(checkpoint, ids, anchors, cache)  # (A, D), (A, K, V)
        labels = _labels(checkpoint, ids, anchors, widest).to(logits.device)  # (A, K)
        counted = labels != IGNORE
        accepted = (_ends_as_one(checkpoint, logits.argmax(-1)) == labels) & counted  # (A, K)
        predicted += head.stride(hidden).tolist()
        possible += (1 + accepted[:, : widest - 1].int().cumprod(1).sum(1)).tolist()
        if tau is not None:
            losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            best += best_stride(losses.view_as(labels), counted, losses.new_tensor([tau]))[0].tolist()
    remaining = [len(ids) - 1 - anchor for anchor in range(first, len(ids) - 1)]
    return TextStrides(predicted, possible, best if tau is not None else None, remaining)


def _mask_block_forward(
    checkpoint: Checkpoint, ids: Sequence[int], anchors: range, cache: KVCache
) -> tuple[Tensor, Tensor]:
    """Hidden states at the anchors (A, D), and logits of a mask block of K slots anchored at each (A, K, V).

    Fed are the A tokens, then A mask blocks; the tokens stay cached, the next forward overwrites the masks.
    """
    assert checkpoint.head is not None
    assert checkpoint.mask_id is not None
    backbone, widest, count = checkpoint.backbone, checkpoint.head.k_max, len(anchors)
    masks = [checkpoint.mask_id] * (count * widest)
    fed = torch.tensor([[*ids[anchors.start : anchors.stop], *masks]], device=backbone.device)  # (1, A + A*K)
    token = torch.arange(count, device=backbone.device)
    step = torch.arange(1, widest + 1, device=backbone.device)
    anchor = torch.cat([token, token.repeat_interleave(widest)])[None]  # (1, A + A*K)
    steps = torch.cat([torch.zeros_like(token), step.repeat(count)])[None]
    attention = cache.set_write_positions(
        0, [anchors.start], fed.shape[1], backbone.device, intervals=mask_blocks(anchor, steps)
    )
    hidden = backbone.forward(fed, attention, cache)[0]
    return hidden[:count], backbone.logits(hidden[count:]).view(count, widest, -1)


def _labels(checkpoint: Checkpoint, ids: Sequence[int], anchors: range, widest: int) -> Tensor:
    """(A, K) the token that each slot of a mask block predicts; IGNORE past the text's end.

    The anchor's own logits predict the token behind it, so slot 1 predicts the second token behind.
    """
    padded = torch.tensor([*ids, *[IGNORE] * (widest + 1)])
    rows = [padded[anchor + 2 : anchor + 2 + widest] for anchor in anchors]
    return _ends_as_one(checkpoint, torch.stack(rows))


def _ends_as_one(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Ids with every end token replaced by the first: the run does not store which one ended a text."""
    ends = torch.tensor(checkpoint.end_ids, device=ids.device)
    return torch.where(torch.isin(ids, ends), ends[:1], ids) if len(ends) else ids


def tables_by_task(
    strides: Sequence[tuple[str, TextStrides]], k_max: int, slot_budget: int
) -> dict[str, dict[str, Any]]:
    """The tables of khead.json, by task and for `all`.  strides: (task, measurement) of each text."""
    texts_of: dict[str, list[TextStrides]] = {}
    for task, text in strides:
        texts_of.setdefault(task, []).append(text)
    texts_of = {**texts_of, ALL: [text for _, text in strides]}
    return {task: _table(texts, k_max, slot_budget) for task, texts in texts_of.items()}


def _table(texts: Sequence[TextStrides], k_max: int, slot_budget: int) -> dict[str, Any]:
    # 1) all places of all texts
    predicted = [stride for text in texts for stride in text.predicted]
    possible = [stride for text in texts for stride in text.possible]
    best = [stride for text in texts for stride in text.best or ()]
    remaining = [tokens for text in texts for tokens in text.remaining]
    joint = [[0] * k_max for _ in range(k_max)]
    for stride, longest in zip(predicted, possible, strict=True):
        joint[stride - 1][longest - 1] += 1
    # 2) cost of each policy; the best fixed stride is the first of the cheapest
    costs = [simulate(name, policy, texts, slot_budget) for name, policy in policies(k_max).items()]
    cost = {each["name"]: each["cost_per_token"] for each in costs}
    fixed = min(range(1, k_max + 1), key=lambda k: cost[f"fixed {k}"])
    return {
        "positions": len(remaining),
        "predicted": _mean(predicted),
        "possible": _mean(possible),
        "k_star": _mean(best) if best else None,
        "joint": joint,
        "calibration": _calibration(predicted, possible, remaining, k_max),
        "by_step": _acceptance_by_step(possible, remaining, k_max),
        "policies": costs,
        "best_fixed": fixed,
        "regret": cost[KHEAD] / cost[f"fixed {fixed}"] - 1,
    }


def _calibration(
    predicted: Sequence[int], possible: Sequence[int], remaining: Sequence[int], k_max: int
) -> list[dict[str, Any]]:
    """For each stride that the K-head predicts: the mean possible stride, and how often the predicted one is possible.

    A predicted stride counts as reached too if it covers the rest of the text.
    """
    rows = []
    for k in range(1, k_max + 1):
        longest = [n for stride, n in zip(predicted, possible, strict=True) if stride == k]
        reached = [
            n >= min(k, rest)
            for stride, n, rest in zip(predicted, possible, remaining, strict=True)
            if stride == k
        ]  # fmt: skip
        if longest:
            rows.append({"predicted": k, "n": len(longest), "mean_possible": _mean(longest), "reached": _mean(reached)})
    return rows


def _acceptance_by_step(possible: Sequence[int], remaining: Sequence[int], k_max: int) -> list[dict[str, Any]]:
    """Share of places whose stride of k is possible, over the places that have k tokens to come."""
    rows = []
    for k in range(1, k_max + 1):
        accepted = [longest >= k for longest, rest in zip(possible, remaining, strict=True) if rest >= k]
        if accepted:
            rows.append({"step": k, "n": len(accepted), "accepted": _mean(accepted)})
    return rows


KHEAD, ORACLE = "K-head", "oracle"
StridePolicy = Callable[[TextStrides, int], int]
"""(text, place) -> stride to draft there."""


def policies(k_max: int) -> dict[str, StridePolicy]:
    """Draft policies by name: the K-head's stride, every fixed stride, and the longest that is possible (oracle)."""
    fixed = {f"fixed {k}": _fixed(k) for k in range(1, k_max + 1)}
    return {KHEAD: lambda text, at: text.predicted[at], **fixed, ORACLE: lambda text, at: text.possible[at]}


def _fixed(stride: int) -> StridePolicy:
    return lambda text, at: stride


def simulate_steps(text: TextStrides, policy: StridePolicy) -> list[tuple[int, int]]:
    """(stride, accepted length) of each speculative step that decodes a text behind its prefill.

    The prefill writes the first token. Each step verifies the draft of its place, accepts the tokens that are right and
    the causal model's own next token, and moves on by that many. (FLUID in steps of one forward, a mask block of full
    width behind every token)
    """
    steps, place, last = [], 0, len(text.remaining) - 1
    while place < last:
        stride = policy(text, place)
        accepted = min(stride, text.possible[place])
        steps.append((stride, accepted))
        place += accepted
    return steps


def simulate(name: str, policy: StridePolicy, texts: Sequence[TextStrides], slot_budget: int) -> dict[str, Any]:
    """Cost of a policy over texts. A draft token takes two slots: the mask that drafts it and the token to verify.

    Prompts are left out, since they are the same for all; so are mask blocks that hedge against rejection.
    """
    steps_of = [simulate_steps(text, policy) for text in texts]
    forwards = sum(1 + len(steps) for steps in steps_of)
    slots = sum(2 * stride - 1 for steps in steps_of for stride, _ in steps)
    tokens = sum(len(text.remaining) for text in texts)
    return {
        "name": name,
        "forwards_per_token": forwards / tokens,
        "slots_per_token": slots / tokens,
        # one division at the end: equal costs are equal to the bit
        "cost_per_token": (forwards * slot_budget + slots) / (slot_budget * tokens),
    }


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
