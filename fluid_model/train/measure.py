"""Held-out measurements of a training: accepted length of mask predictions, and drift from the parent.

Legend: B rows, L slots, M slots chosen, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from .data import Pack, TrainingSet
from .row_layouts import IGNORE, CausalLayout, Layout, TrainingRow
from .stages import Batch, collate, slot_logits

DRIFT_SLOTS = 1024
"""Response tokens that drift is measured on; the parent's logits for them are stored."""


class HeldOutBatch(NamedTuple):
    """Training rows and the batch that `collate` makes of them."""

    rows: list[TrainingRow]
    batch: Batch


class HeldOut:
    """Held-out examples and the parent's logits on them; created before a training's first step.

    layout: builds rows without restored slots, as a decoder starts.  causal: whether the model keeps a causal path,
    whose drift is measured.  batch, multiple: rows of a batch, and see `collate`.
    """

    def __init__(
        self, model: PreTrainedModel, packs: Sequence[Pack], layout: Layout, batch: int, *, causal: bool, multiple: int
    ) -> None:
        self.inner, self.causal = model, causal
        self._masked = _batches(packs, layout, batch, multiple)
        self._causal = _batches(packs, CausalLayout(), batch, multiple) if causal else []
        self._parent_logits = [logits.to(torch.bfloat16) for logits in self._causal_logits(model)]

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """accepted: mean accepted length of one forward over masks, greedy; the causal path's own token counts as one.
        drift: KL(parent || model) of the next token, nats.
        """
        lengths: list[int] = []
        for rows, batch in self._masked:
            lengths += self._accepted_lengths(model, rows, batch)
        figures = {"accepted": self.causal + sum(lengths) / max(1, len(lengths))}
        if self.causal:
            pairs = zip(self._parent_logits, self._causal_logits(model), strict=True)
            drift = [kl_divergence(parent.float(), logits) for parent, logits in pairs]
            figures["drift"] = float(torch.cat(drift).mean()) if drift else 0.0
        return figures

    def _chosen_logits(self, model: Any, batch: Batch, slots: Tensor) -> Tensor:
        """(M, V) logits of the chosen slots, (B, L) bool."""
        device = self.inner.device
        moved = {name: value.to(device) for name, value in batch.items()}
        return slot_logits(model, self.inner, moved, slots.to(device))

    @torch.no_grad()
    def _causal_logits(self, model: Any) -> list[Tensor]:
        """Logits of the first DRIFT_SLOTS response tokens: (M, V) per batch, on the CPU."""
        chosen, left = [], DRIFT_SLOTS
        for _, batch in self._causal:
            logits = self._chosen_logits(model, batch, batch["labels"] != IGNORE)[:left].cpu()
            chosen.append(logits)
            left -= len(logits)
            if left <= 0:
                break
        return chosen

    def _accepted_lengths(self, model: Any, rows: list[TrainingRow], batch: Batch) -> list[int]:
        """Accepted length of every mask block, noised block or canvas of a batch."""
        # 1) greedy predictions of mask slots; a block's first token, predicted from a clean one, does not count
        chosen = (batch["diff_weight"] > 0) & (batch["ar_weight"] == 0)
        if not bool(chosen.any()):
            return []
        predictions = self._chosen_logits(model, batch, chosen).argmax(-1).cpu()
        correct = predictions == batch["labels"][chosen]
        # 2) group them by example and anchor
        blocks: dict[tuple[int, int, int], list[tuple[int, bool]]] = defaultdict(list)
        for (row, slot), is_correct in zip(chosen.nonzero().tolist(), correct.tolist(), strict=True):
            training_row = rows[row]
            block = (row, training_row.segment[slot], training_row.anchor[slot])
            blocks[block].append((training_row.positions[slot], is_correct))
        # 3) in order of position, count up to the first error
        return [accepted_length([is_correct for _, is_correct in sorted(block)]) for block in blocks.values()]


def _batches(packs: Sequence[Pack], layout: Layout, batch: int, multiple: int) -> list[HeldOutBatch]:
    """All packs once, with the noise of seed 0."""
    dataset = TrainingSet(packs, layout, steps=1, batch=len(packs), seed=0)
    rows = [dataset[i] for i in range(len(dataset))]
    parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return [HeldOutBatch(part, collate(part, multiple)) for part in parts]


def accepted_length(correct: list[bool]) -> int:
    """Correct tokens before the first error."""
    return correct.index(False) if False in correct else len(correct)


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of two sets of logits (M, V), in nats: (M,)."""
    p, q = functional.log_softmax(before, -1), functional.log_softmax(after, -1)
    return (p.exp() * (p - q)).sum(-1)
