"""What a K-head says against what drafts are worth: teacher forcing on a run's texts, and rounds played over them.
`fluid-eval khead`; the method is in docs/khead.md.

A stride of k is k tokens: the causal model's own next one, which is certain, and k - 1 drafts.

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

from ..running.worker import set_slot_budget
from .acceptance import ALL
from .losslessness import promises
from .reopen import Text, open_stored

ANCHORS = 16
"""Places that are looked at in one forward."""


@dataclass(frozen=True)
class Places:
    """All places of one text that a token follows, from the prompt's last token on; lists of one length.

    predicted: the K-head's stride.  possible: tokens that the widest draft gets right, 1..K, as far as the text goes.
    best: K*, None without a tau.  left: tokens to come.
    """

    predicted: list[int]
    possible: list[int]
    best: list[int] | None
    left: list[int]


def khead_run(folder: Path) -> dict[str, Any]:
    """What khead.json holds of a finished run.

    Raises ConfigError if it cannot be opened, has no K-head, or its text is not greedy AR's.
    """
    stored = open_stored(folder)
    checkpoint, decoder = stored.checkpoint, stored.spec.decoder
    if checkpoint.head is None or checkpoint.mask_id is None:
        raise ConfigError(f"{stored.spec.model.path} has no K-head to look at")
    if not promises(decoder) or decoder.temperature:
        raise ConfigError("this text is not greedy AR's, which drafts are held against; run with verify=true")
    set_slot_budget(checkpoint, replace(stored.spec, decoder=FluidSettings()))
    budget = getattr(decoder, "slot_budget", None) or checkpoint.backbone.slot_budget
    manifest = checkpoint.manifest
    tau = manifest.tau[manifest.choose(stored.spec.model.tau)] if manifest else None
    places = [(text.task, look(checkpoint, text, tau)) for text in stored.texts if text.ids or text.ended]
    return {
        "model": stored.spec.model.path,
        "tau": tau,
        "k_max": checkpoint.head.k_max,
        "positions": sum(len(each.left) for _, each in places),
        "slot_budget": budget,
        "tasks": tables(places, checkpoint.head.k_max, budget),
    }


@torch.inference_mode()
def look(checkpoint: Checkpoint, text: Text, tau: float | None) -> Places:
    """Feed a text as rounds of one forward would, a full fan of masks behind every place, and read all of it off."""
    head, backbone = checkpoint.head, checkpoint.backbone
    assert head is not None
    ids = (*text.prompt, *text.ids, *checkpoint.end_ids[: text.ended])
    first, widest = len(text.prompt) - 1, head.k_max
    cache = KVCache(1, len(ids) + ANCHORS * (widest + 1))
    if first:
        prompt = torch.tensor([ids[:first]], device=backbone.device)
        backbone.forward(prompt, cache.set_write_positions(0, [0], first, backbone.device), cache)
    predicted, possible, best = list[int](), list[int](), list[int]()
    for start in range(first, len(ids) - 1, ANCHORS):
        anchors = range(start, min(start + ANCHORS, len(ids) - 1))
        hidden, logits = _fans(checkpoint, ids, anchors, cache)
        labels = _labels(checkpoint, ids, anchors, widest).to(logits.device)  # (A, K)
        counted = labels != IGNORE
        right = (_ends_as_one(checkpoint, logits.argmax(-1)) == labels) & counted
        predicted += head.stride(hidden).tolist()
        possible += (1 + right[:, : widest - 1].int().cumprod(1).sum(1)).tolist()
        if tau is not None:
            losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            best += best_stride(losses.view_as(labels), counted, losses.new_tensor([tau]))[0].tolist()
    left = [len(ids) - 1 - anchor for anchor in range(first, len(ids) - 1)]
    return Places(predicted, possible, best if tau is not None else None, left)


def _fans(checkpoint: Checkpoint, ids: Sequence[int], anchors: range, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Hidden states at tokens (A, D), and logits of a full fan behind each of them (A, K, V)."""
    assert checkpoint.head is not None
    assert checkpoint.mask_id is not None
    backbone, widest, count = checkpoint.backbone, checkpoint.head.k_max, len(anchors)
    masks = [checkpoint.mask_id] * (count * widest)
    fed = torch.tensor([[*ids[anchors.start : anchors.stop], *masks]], device=backbone.device)
    token = torch.arange(count, device=backbone.device)
    step = torch.arange(1, widest + 1, device=backbone.device)
    anchor = torch.cat([token, token.repeat_interleave(widest)])[None]
    steps = torch.cat([torch.zeros_like(token), step.repeat(count)])[None]
    reading = cache.set_write_positions(
        0, [anchors.start], fed.shape[1], backbone.device, intervals=mask_blocks(anchor, steps)
    )
    hidden = backbone.forward(fed, reading, cache)[0]
    return hidden[:count], backbone.logits(hidden[count:]).view(count, widest, -1)


def _labels(checkpoint: Checkpoint, ids: Sequence[int], anchors: range, widest: int) -> Tensor:
    """(A, K) what each slot of a fan is to say, IGNORE past the text's end."""
    padded = torch.tensor([*ids, *[IGNORE] * (widest + 1)])
    rows = [padded[anchor + 2 : anchor + 2 + widest] for anchor in anchors]
    return _ends_as_one(checkpoint, torch.stack(rows))


def _ends_as_one(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Ids, all that end a text written as the first of them: which one it was is not stored."""
    ends = torch.tensor(checkpoint.end_ids, device=ids.device)
    return torch.where(torch.isin(ids, ends), ends[:1], ids) if len(ends) else ids


def tables(places: Sequence[tuple[str, Places]], k_max: int, slot_budget: int) -> dict[str, dict[str, Any]]:
    """What khead.json says of each task and of `all`.  places: (task, of one text)."""
    by_task: dict[str, list[Places]] = {}
    for task, each in places:
        by_task.setdefault(task, []).append(each)
    everything = [each for _, each in places]
    return {task: _table(found, k_max, slot_budget) for task, found in {**by_task, ALL: everything}.items()}


def _table(texts: Sequence[Places], k_max: int, slot_budget: int) -> dict[str, Any]:
    predicted, possible, left = (
        [n for t in texts for n in getattr(t, name)] for name in ("predicted", "possible", "left")
    )
    best = [n for t in texts for n in t.best or ()]
    joint = [[0] * k_max for _ in range(k_max)]
    for stride, most in zip(predicted, possible, strict=True):
        joint[stride - 1][most - 1] += 1
    calibration, steps = [], []
    for k in range(1, k_max + 1):
        said = [(most, min(k, rest)) for p, most, rest in zip(predicted, possible, left, strict=True) if p == k]
        if said:
            calibration.append(
                {"predicted": k, "n": len(said), "mean_possible": _mean(most for most, _ in said),
                 "reached": _mean(most >= wanted for most, wanted in said)}
            )  # fmt: skip
        there = [most >= k for most, rest in zip(possible, left, strict=True) if rest >= k]
        if there:
            steps.append({"step": k, "n": len(there), "accepted": _mean(there)})
    policies = [play(name, rule, texts, slot_budget) for name, rule in rules(k_max).items()]
    cost = {policy["name"]: policy["cost_per_token"] for policy in policies}
    fixed = min(range(1, k_max + 1), key=lambda k: cost[f"fixed {k}"])
    return {
        "positions": len(left),
        "predicted": _mean(predicted),
        "possible": _mean(possible),
        "k_star": _mean(best) if best else None,
        "joint": joint,
        "calibration": calibration,
        "by_step": steps,
        "policies": policies,
        "best_fixed": fixed,
        "regret": cost[KHEAD] / cost[f"fixed {fixed}"] - 1,
    }


KHEAD, ORACLE = "K-head", "oracle"
Rule = Callable[[Places, int], int]
"""The stride at a place of a text."""


def rules(k_max: int) -> dict[str, Rule]:
    """Policies by name: the K-head's stride, every fixed one, and the longest that is right."""
    fixed = {f"fixed {k}": _fixed(k) for k in range(1, k_max + 1)}
    return {KHEAD: lambda text, at: text.predicted[at], **fixed, ORACLE: lambda text, at: text.possible[at]}


def _fixed(stride: int) -> Rule:
    return lambda text, at: stride


def rounds(text: Places, rule: Rule) -> list[tuple[int, int]]:
    """(stride, tokens kept) of each round that writes a text behind its prompt's forward, which writes the first token.

    A round checks the drafts made at its place and keeps those that are right; one more token is certain. Its place is
    then so much further. (FLUID in rounds of one forward, a full fan behind every token)
    """
    found, place, last = [], 0, len(text.left) - 1
    while place < last:
        stride = rule(text, place)
        kept = min(stride, text.possible[place])
        found.append((stride, kept))
        place += kept
    return found


def play(name: str, rule: Rule, texts: Sequence[Places], slot_budget: int) -> dict[str, Any]:
    """What a policy costs. A draft is fed twice, as the mask that makes it and as the token that is checked; prompts,
    the same for all, are left out, and so are fans that hedge where drafts end.
    """
    played = [rounds(text, rule) for text in texts]
    forwards = sum(1 + len(each) for each in played)
    slots = sum(2 * stride - 1 for each in played for stride, _ in each)
    tokens = sum(len(text.left) for text in texts)
    return {
        "name": name,
        "forwards_per_token": forwards / tokens,
        "slots_per_token": slots / tokens,
        "cost_per_token": (forwards * slot_budget + slots) / (slot_budget * tokens),  # equal costs are equal to the bit
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
