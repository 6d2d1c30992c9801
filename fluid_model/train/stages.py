"""What each stage feeds the model and what it minimises.

Legend: B rows, L slots of a laid-out row, M slots with a label, D hidden, V vocabulary, K widest stride, T taus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from ..forward import attention_masks
from ..forward.khead import KHead
from .losses import best_stride, horizon, horizon_target, weighted
from .row_layouts import IGNORE, Expanded

Batch = dict[str, Tensor]
FLEX_MULTIPLE = 128
"""Slots of a batch are padded to a multiple of this for FlexAttention: few shapes, few compilations."""


def collate(rows: Sequence[Expanded], multiple: int = 1) -> Batch:
    """Pad rows to one length: ids, positions, labels, segment, anchor, step, ar, diff, each (B, L); targets (B,).

    segment, anchor and step are left out where every row is one plain causal segment: the model's own mask is theirs.
    """
    longest = -(-max(len(row.ids) for row in rows) // multiple) * multiple

    def pad(name: str, value: float) -> Tensor:
        lists = (getattr(row, name) for row in rows)
        return torch.tensor([[*values, *[value] * (longest - len(values))] for values in lists])

    batch = {
        "ids": pad("ids", 0), "positions": pad("positions", 0), "labels": pad("labels", IGNORE),
        "ar": pad("ar", 0.0), "diff": pad("diff", 0.0), "targets": torch.tensor([float(row.targets) for row in rows]),
    }  # fmt: skip
    segment, anchor, step = pad("segment", -1), pad("anchor", -1), pad("step", 0)
    if bool(((anchor == batch["positions"]) & (step == 0) & (segment == 0) | (segment < 0)).all()):
        return batch
    return {**batch, "segment": segment, "anchor": anchor, "step": step}


def attention(batch: Batch, model: PreTrainedModel) -> Tensor | BlockMask | None:
    """The attention mask as the model wants it: None (its own causal mask), a block mask for FlexAttention, or a dense
    additive (B, 1, L, L), 0 where readable and the dtype's lowest number elsewhere.
    """
    if "segment" not in batch:
        return None
    segment, anchor, step = batch["segment"], batch["anchor"], batch["step"]
    if model.config._attn_implementation != "flex_attention":
        readable = attention_masks.training_mask(segment, anchor, step)
        mask = torch.zeros(readable.shape, dtype=model.dtype, device=readable.device)
        return mask.masked_fill_(~readable, torch.finfo(model.dtype).min)[:, None]

    enter, exit_ = attention_masks.training_intervals(segment, anchor, step)

    def rule(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_masks.attends(enter[b, q], enter[b, k], exit_[b, k]) | (q == k)

    rows, slots = segment.shape
    return create_block_mask(rule, rows, None, slots, slots, device=segment.device, _compile=segment.is_cuda)


@contextmanager
def only_slots(model: PreTrainedModel, wanted: Tensor) -> Iterator[None]:
    """Within, the model projects only the wanted slots (B, L) bool to the vocabulary: logits come as (M, V).

    The hidden states of all slots (B, L, D) pass unseen; this is what makes long laid-out rows fit.
    """
    projection = model.get_output_embeddings()
    hook = projection.register_forward_pre_hook(lambda _, inputs: (inputs[0][wanted], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def slot_logits(model: Any, inner: PreTrainedModel, batch: Batch, wanted: Tensor) -> Tensor:
    """Logits of the wanted slots (B, L) bool, in row order: (M, V) float32.

    model: what to call (it may be wrapped for several devices).  inner: the transformers model inside.
    """
    with only_slots(inner, wanted):
        logits: Tensor = model(
            input_ids=batch["ids"],
            position_ids=batch["positions"],
            attention_mask=attention(batch, inner),
            use_cache=False,
        ).logits
    return logits.float()


def slot_losses(model: Any, inner: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every labelled slot, in row order: (M,)."""
    wanted = batch["labels"] != IGNORE
    return functional.cross_entropy(slot_logits(model, inner, batch, wanted), batch["labels"][wanted], reduction="none")


def row_loss(
    model: Any, inner: PreTrainedModel, batch: Batch, weights: tuple[float, float] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """All stages but fluid-horizon: the loss, and its terms apart."""
    losses = slot_losses(model, inner, batch)
    wanted = batch["labels"] != IGNORE
    ar, diff = batch["ar"][wanted], batch["diff"][wanted]
    loss, l_ar, l_diff = weighted(losses, ar, diff, batch["targets"].sum(), weights)
    terms = {"l_ar": (ar, l_ar.detach()), "l_diff": (diff, l_diff.detach())}
    return loss, {name: value for name, (weight, value) in terms.items() if bool(weight.any())}


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
        if "step" not in batch:  # no fan was drawn in any of these rows
            return {"loss": torch.stack([p.sum() for p in self.heads.parameters()]).sum() * 0.0}
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
            attention_mask=attention(batch, backbone),
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
