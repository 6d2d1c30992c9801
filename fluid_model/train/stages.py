"""Forward and loss of each training stage: batches of training rows, attention masks, slot losses, K-head training.

Legend: B rows, L slots of a training row, M slots with a label, A anchors of mask blocks, D hidden, V vocabulary,
K widest stride, T taus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from ..forward import attention_masks
from ..forward.khead import KHead
from .gated import GatedStage
from .losses import best_stride, combine_losses, horizon_loss, horizon_target
from .row_layouts import IGNORE, TrainingRow

Batch = dict[str, Tensor]
FLEX_MULTIPLE = 128
"""FlexAttention's batches are padded to a multiple of these slots: few shapes, few compilations."""


def collate(rows: Sequence[TrainingRow], multiple: int = 1) -> Batch:
    """Pad rows to one length: ids, positions, labels, segment, anchor, step, ar_weight, diff_weight, each (B, L);
    diff_count (B,).

    segment, anchor and step are left out where every row is one causal segment: the model's own mask serves these.
    """
    # 1) pad, to a multiple where asked
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // multiple) * multiple

    def pad(name: str, value: float) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([[*values, *[value] * (length - len(values))] for values in lists])

    batch = {
        "ids": pad("ids", 0),
        "positions": pad("positions", 0),
        "labels": pad("labels", IGNORE),
        "ar_weight": pad("ar_weight", 0.0),
        "diff_weight": pad("diff_weight", 0.0),
        "diff_count": torch.tensor([float(row.diff_count) for row in rows]),
    }
    segment, anchor, step = pad("segment", -1), pad("anchor", -1), pad("step", 0)
    # 2) a causal token is anchored at itself
    causal = (anchor == batch["positions"]) & (step == 0) & (segment == 0)
    padding = segment < 0
    if bool((causal | padding).all()):
        return batch
    return {**batch, "segment": segment, "anchor": anchor, "step": step}


def attention_mask(batch: Batch, model: PreTrainedModel) -> Tensor | BlockMask | None:
    """The batch's attention mask in the form that the model takes.

    None: the model's own causal mask. FlexAttention: a block mask. Else dense and additive, (B, 1, L, L): 0 where the
    query attends to the key, the dtype's lowest number elsewhere.
    """
    if "segment" not in batch:
        return None
    segment, anchor, step = batch["segment"], batch["anchor"], batch["step"]
    if model.config._attn_implementation != "flex_attention":
        attended = attention_masks.training_mask(segment, anchor, step)  # (B, L, L)
        mask = torch.zeros(attended.shape, dtype=model.dtype, device=attended.device)
        return mask.masked_fill_(~attended, torch.finfo(model.dtype).min)[:, None]

    enter, exit_ = attention_masks.training_intervals(segment, anchor, step)

    def rule(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_masks.attends(enter[b, q], enter[b, k], exit_[b, k]) | (q == k)

    rows, slots = segment.shape
    return create_block_mask(rule, rows, None, slots, slots, device=segment.device, _compile=segment.is_cuda)


@contextmanager
def project_only(model: PreTrainedModel, slots: Tensor) -> Iterator[None]:
    """Within, the output projection sees only the chosen slots, (B, L) bool: logits come as (M, V), not (B, L, V).

    Logits of all slots would not fit in memory for long training rows.
    """
    projection = model.get_output_embeddings()
    hook = projection.register_forward_pre_hook(lambda _, inputs: (inputs[0][slots], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def slot_logits(model: Any, inner: PreTrainedModel, batch: Batch, slots: Tensor) -> Tensor:
    """Logits of the chosen slots, (B, L) bool, in row order: (M, V) float32.

    model: the module to call, which may wrap several devices.  inner: the transformers model inside.
    """
    if isinstance(model, GatedStage):
        return model.slot_logits(batch, slots)
    with project_only(inner, slots):
        logits: Tensor = model(
            input_ids=batch["ids"],
            position_ids=batch["positions"],
            attention_mask=attention_mask(batch, inner),
            use_cache=False,
        ).logits
    return logits.float()


def slot_losses(model: Any, inner: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every labelled slot, in row order: (M,)."""
    labelled = batch["labels"] != IGNORE
    logits = slot_logits(model, inner, batch, labelled)  # (M, V)
    return functional.cross_entropy(logits, batch["labels"][labelled], reduction="none")


def row_loss(
    model: Any, inner: PreTrainedModel, batch: Batch, term_weights: tuple[float, float] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every stage but fluid-horizon, and the terms that have slots in this batch: l_ar, l_diff."""
    losses = slot_losses(model, inner, batch)
    labelled = batch["labels"] != IGNORE
    ar_weight, diff_weight = batch["ar_weight"][labelled], batch["diff_weight"][labelled]
    terms = combine_losses(losses, ar_weight, diff_weight, batch["diff_count"].sum(), term_weights)
    logged = {}
    if bool(ar_weight.any()):
        logged["l_ar"] = terms.ar.detach()
    if bool(diff_weight.any()):
        logged["l_diff"] = terms.diff.detach()
    return terms.total, logged


class BlockLosses(NamedTuple):
    """Mask blocks of a batch, in order of row and anchor.

    hidden: (A, D) states at their anchors.  losses: (A, K) cross-entropy in nats.  valid: (A, K) bool, slots present.
    """

    hidden: Tensor
    losses: Tensor
    valid: Tensor


class HorizonCalibration(nn.Module):
    """FLUID's stage 2: one K-head per tau over a frozen backbone.  (FLUID, horizon calibration)"""

    def __init__(
        self, backbone: PreTrainedModel, k_max: int, tau: Sequence[float], gated: GatedStage | None = None
    ) -> None:
        """gated: computes the hidden states where the backbone has a gated adapter."""
        super().__init__()
        size = backbone.config.get_text_config(decoder=True).hidden_size
        self.heads = nn.ModuleList([KHead(size, k_max) for _ in tau])
        self.k_max = k_max
        self._tau = list(tau)
        self._backbone = [backbone.requires_grad_(False).eval()]  # in a list: not one of this module's parameters
        self._gated = [gated]

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """loss, summed over taus, and for the log stride, the mean K* of each tau: (T,)."""
        if "step" not in batch:  # no mask block was drawn in these rows
            return {"loss": torch.stack([p.sum() for p in self.heads.parameters()]).sum() * 0.0}
        # 1) label every anchor with K*
        blocks = self.block_losses(batch)
        stride = best_stride(blocks.losses, blocks.valid, blocks.losses.new_tensor(self._tau))  # (T, A)
        # 2) K-heads predict it
        logits = torch.stack([head(blocks.hidden) for head in self.heads])  # (T, A, K)
        per_tau = []
        for tau_logits, tau_stride in zip(logits, stride, strict=True):
            per_tau.append(horizon_loss(tau_logits, horizon_target(tau_stride, self.k_max)))
        return {"loss": torch.stack(per_tau).sum(), "stride": stride.float().mean(-1)}

    @torch.no_grad()
    def block_losses(self, batch: Batch) -> BlockLosses:
        """The backbone's losses in every mask block, and its hidden states at the anchors."""
        # 1) forward; only slots of mask blocks are projected to the vocabulary
        (backbone,), (gated,) = self._backbone, self._gated
        if gated is not None:
            states = gated.states(batch)  # (B, L, D)
        else:
            states = backbone.base_model(
                input_ids=batch["ids"],
                position_ids=batch["positions"],
                attention_mask=attention_mask(batch, backbone),
                use_cache=False,
            ).last_hidden_state
        masks = batch["step"] > 0
        logits = backbone.get_output_embeddings()(states[masks]).float()  # (M, V)
        losses = functional.cross_entropy(logits, batch["labels"][masks], reduction="none")  # 0 without a label
        # 2) one table row per mask block, one column per step
        row, slot = masks.nonzero(as_tuple=True)
        anchor, step = batch["anchor"][row, slot], batch["step"][row, slot]
        blocks, index = torch.unique(torch.stack([row, anchor], 1), dim=0, return_inverse=True)  # (A, 2), (M,)
        table = losses.new_zeros(len(blocks), self.k_max)
        valid = torch.zeros_like(table, dtype=torch.bool)
        table[index, step - 1] = losses
        valid[index, step - 1] = True
        # 3) hidden states in the heads' number format
        hidden = states[blocks[:, 0], blocks[:, 1]].to(next(self.heads.parameters()).dtype)
        return BlockLosses(hidden, table, valid)
