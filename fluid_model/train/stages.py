"""What each stage feeds the model and what it minimises.

Legend: B rows, L slots of an expanded row, M slots with a label, D hidden, V vocabulary, K widest stride, T taus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from .. import masks
from ..khead import KHead
from ..layout import IGNORE, Expanded
from .losses import best_stride, horizon, horizon_target, hybrid

Batch = dict[str, Tensor]


def collate(rows: Sequence[Expanded]) -> Batch:
    """Pad expanded rows to one length: ids, positions, labels, anchor, step, each (B, L)."""

    def pad(name: str, value: int) -> Tensor:
        lists = [torch.tensor(getattr(row, name)) for row in rows]
        return nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=value)

    return {
        "ids": pad("ids", 0),
        "positions": pad("positions", 0),
        "labels": pad("labels", IGNORE),
        "anchor": pad("anchor", -1),
        "step": pad("step", 0),
    }


def additive(readable: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, L) bool -> (B, 1, L, L): 0 where readable, the dtype's lowest number elsewhere."""
    mask = torch.zeros(readable.shape, dtype=dtype, device=readable.device)
    return mask.masked_fill_(~readable, torch.finfo(dtype).min)[:, None]


@contextmanager
def only_slots(model: PreTrainedModel, wanted: Tensor) -> Iterator[None]:
    """Within, the model projects only the wanted slots (B, L) bool to the vocabulary: logits come as (M, V).

    The hidden states of all slots (B, L, D) pass unseen; this is what makes long expanded rows fit.
    """
    projection = model.get_output_embeddings()
    hook = projection.register_forward_pre_hook(lambda _, inputs: (inputs[0][wanted], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def slot_losses(model: Any, inner: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every labelled slot, in row order: (M,).

    model: what to call (it may be wrapped for several devices).  inner: the transformers model inside.
    """
    wanted = batch["labels"] != IGNORE
    has_fans = bool((batch["step"] > 0).any())
    mask = additive(masks.fans(batch["anchor"], batch["step"]), inner.dtype) if has_fans else None
    with only_slots(inner, wanted):
        logits = model(
            input_ids=batch["ids"], position_ids=batch["positions"], attention_mask=mask, use_cache=False
        ).logits
    return functional.cross_entropy(logits.float(), batch["labels"][wanted], reduction="none")


def row_loss(
    model: Any, inner: PreTrainedModel, batch: Batch, weight: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Stages ar and fluid-hybrid: the loss, and its terms apart."""
    losses = slot_losses(model, inner, batch)
    in_fan = (batch["step"] > 0)[batch["labels"] != IGNORE]
    loss, l_ar, l_diff = hybrid(losses, in_fan, weight)
    return loss, {"l_ar": l_ar.detach(), **({"l_diff": l_diff.detach()} if bool(in_fan.any()) else {})}


class Horizons(nn.Module):
    """Stage fluid-horizon: one K-head per tau over a frozen backbone, which is kept out of the parameters."""

    def __init__(self, backbone: PreTrainedModel, k_max: int, tau: Sequence[float]) -> None:
        super().__init__()
        size = backbone.config.get_text_config(decoder=True).hidden_size
        self.heads = nn.ModuleList([KHead(size, k_max) for _ in tau])
        self.k_max = k_max
        self._tau = list(tau)
        self._backbone = [backbone.requires_grad_(False).eval()]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Loss, summed over taus, and each tau's mean K* for the log."""
        hidden, losses, counted = self._measure(batch)
        stride = best_stride(losses, counted, losses.new_tensor(self._tau))  # (T, A)
        logits = torch.stack([head(hidden) for head in self.heads])  # (T, A, K)
        per_tau = [horizon(row, horizon_target(best, self.k_max)) for row, best in zip(logits, stride, strict=True)]
        return {"loss": torch.stack(per_tau).sum(), "stride": stride.float().mean(-1)}

    @torch.no_grad()
    def _measure(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (A, D) at the anchors of full fans, and their slots' losses and validity (A, K)."""
        (backbone,) = self._backbone
        fans = batch["step"] > 0
        output = backbone.base_model(
            input_ids=batch["ids"],
            position_ids=batch["positions"],
            attention_mask=additive(masks.fans(batch["anchor"], batch["step"]), backbone.dtype),
            use_cache=False,
        )
        states = output.last_hidden_state
        logits = backbone.get_output_embeddings()(states[fans]).float()
        losses = functional.cross_entropy(logits, batch["labels"][fans], reduction="none")
        row, slot = fans.nonzero(as_tuple=True)
        anchor, step = batch["anchor"][row, slot], batch["step"][row, slot]
        pairs, index = torch.unique(torch.stack([row, anchor], 1), dim=0, return_inverse=True)  # (A, 2)
        table = losses.new_zeros(len(pairs), self.k_max)
        counted = torch.zeros_like(table, dtype=torch.bool)
        table[index, step - 1] = losses
        counted[index, step - 1] = True
        weight = next(self.heads.parameters())
        return states[pairs[:, 0], pairs[:, 1]].to(weight.dtype), table, counted
