"""What a training tells of itself on held-out rows: how far drafts reach, how far the model has left its parent.

Legend: B rows, L slots, M slots looked at, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from .data import Pack, Rows
from .row_layouts import IGNORE, Expanded, Layout, Plain
from .stages import Batch, collate, slot_logits

DRIFT_SLOTS = 1024
"""Response tokens the parent's logits are kept for."""


class HeldOut:
    """Held-out rows and the parent's answers to them; made before the first step of a training.

    full: lays rows out with nothing restored, as a decoder starts.  causal: whether there is an AR path to compare.
    """

    def __init__(
        self, model: PreTrainedModel, packs: Sequence[Pack], full: Layout, batch: int, *, causal: bool, multiple: int
    ) -> None:
        self.inner, self.causal = model, causal
        self._full = self._batches(packs, full, batch, multiple)
        self._plain = self._batches(packs, Plain(), batch, multiple) if causal else []
        self._parent = [logits.to(torch.bfloat16) for logits in self._causal_logits(model)]

    @torch.no_grad()
    def look(self, model: Any) -> dict[str, float]:
        """accepted: tokens in a row that one look at an all-mask canvas gets right, the causal model's own first token
        counted.  drift: KL(parent || model) of the next token, nats.
        """
        runs = [run for rows, batch in self._full for run in self._runs(model, rows, batch)]
        found = {"accepted": self.causal + sum(runs) / max(1, len(runs))}
        if self.causal:
            pairs = zip(self._parent, self._causal_logits(model), strict=True)
            drift = [divergence(before.float(), after) for before, after in pairs]
            found["drift"] = float(torch.cat(drift).mean()) if drift else 0.0
        return found

    def _batches(
        self, packs: Sequence[Pack], lay: Layout, batch: int, multiple: int
    ) -> list[tuple[list[Expanded], Batch]]:
        rows = Rows(packs, lay, steps=1, batch=len(packs), seed=0)
        laid = [rows[i] for i in range(len(rows))]
        parts = [laid[i : i + batch] for i in range(0, len(laid), batch)]
        return [(part, collate(part, multiple)) for part in parts]

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.inner.device) for name, value in batch.items()}

    @torch.no_grad()
    def _causal_logits(self, model: Any) -> list[Tensor]:
        """Logits of the first DRIFT_SLOTS response tokens: (M, V) a batch, on the CPU."""
        found, room = [], DRIFT_SLOTS
        for _, batch in self._plain:
            wanted = batch["labels"] != IGNORE
            moved = self._on_device(batch)
            logits = slot_logits(model, self.inner, moved, wanted.to(self.inner.device))[:room].cpu()
            found.append(logits)
            room -= len(logits)
            if room <= 0:
                break
        return found

    def _runs(self, model: Any, rows: list[Expanded], batch: Batch) -> list[int]:
        """Right guesses in a row, for every group of drafts."""
        wanted = (batch["diff"] > 0) & (batch["ar"] == 0)  # not the clean token that says a block's first
        if not bool(wanted.any()):
            return []
        moved = self._on_device(batch)
        guess = slot_logits(model, self.inner, moved, wanted.to(self.inner.device)).argmax(-1).cpu()
        right = guess == batch["labels"][wanted]
        marked = []
        for (row, slot), good in zip(wanted.nonzero().tolist(), right.tolist(), strict=True):
            laid = rows[row]
            marked.append(((row, laid.segment[slot], laid.anchor[slot]), laid.positions[slot], good))
        marked.sort()
        groups = groupby(marked, key=lambda item: item[0])
        return [leading([good for _, _, good in group]) for _, group in groups]


def leading(good: list[bool]) -> int:
    """How many are true before the first that is not."""
    return next((i for i, value in enumerate(good) if not value), len(good))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of two sets of logits (M, V), in nats: (M,)."""
    p, q = functional.log_softmax(before, -1), functional.log_softmax(after, -1)
    return (p.exp() * (p - q)).sum(-1)
