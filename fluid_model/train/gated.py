"""Training of a gated adapter: one forward of the tokens without gradients, and one of the mask blocks that reads it.

The adapter acts on mask slots alone, so the tokens' keys and values are the parent's and need no gradient. A mask block
stands behind the tokens up to its anchor. Blocks that are narrower than the widest share a row:

    tokens       a b c d e           one row, the parent's forward; its keys and values are recorded
    mask blocks  a b . . .  M M      anchored at b: recorded keys up to the anchor, then its own slots
                 a . . . .  M .      anchored at a, and
                 a b c d .  . M      anchored at d, in one row; a slot attends to its own block

The same distribution that verification will compare with is in the first forward: the parent's own at every token.

Legend: B rows, L slots, N tokens of a row, A rows of mask blocks, K slots of the widest block, M labelled slots, D
hidden, V vocabulary, G key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..forward.attention_masks import training_mask
from ..forward.backbone import Backbone
from ..forward.gated_lora import GatedLora
from ..forward.llama import ExplicitForward
from .recipe import LossTarget
from .row_layouts import IGNORE


class TokenStore:
    """Records keys and values of a row's tokens, (1, 2 G, N, E) a layer."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def put(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Record one layer's; return them as keys and values, (1, G, N, E) each."""
        self.layers.append(keys_values)
        keys, values = keys_values.chunk(2, 1)
        return keys, values


class BlockStore:
    """Puts recorded tokens before the keys and values of each row of mask blocks."""

    def __init__(self, tokens: TokenStore) -> None:
        self._tokens = tokens

    def put(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(A, 2 G, K, E) of one layer -> (A, G, N + K, E) each."""
        recorded = self._tokens.layers[layer].expand(len(keys_values), -1, -1, -1)
        keys, values = torch.cat((recorded, keys_values), 2).chunk(2, 1)
        return keys, values


class BlockSlots(NamedTuple):
    """Where the mask blocks of a row stand.

    slots: (A, K) their slots in the row, a whole block in one of the A; what is left repeats the first slot.
    valid: (A, K) bool, False for repeats.
    """

    slots: Tensor
    valid: Tensor


class GatedStage(nn.Module):
    """A parent and the gated adapter that is trained over it."""

    def __init__(self, backbone: Backbone, target: LossTarget = "labels") -> None:
        """target: what mask slots learn, see `LossSpec`."""
        super().__init__()
        assert backbone.adapter is not None
        self.adapter: GatedLora = backbone.adapter
        self._target = target
        self._backbone = [backbone]  # in a list: the parent's weights are none of this module's parameters
        self._forward = ExplicitForward(backbone.model.requires_grad_(False), backbone.window, self.adapter)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """loss, the weighted mean over labelled mask slots, and the same as l_diff."""
        labelled = (batch["step"] > 0) & (batch["labels"] != IGNORE) if "step" in batch else None
        if labelled is None or not bool(labelled.any()):  # no mask block was drawn in these rows
            return {"loss": torch.stack([p.sum() for p in self.adapter.parameters()]).sum() * 0.0}
        states = self.states(batch)
        logits = self._project(states[labelled])  # (M, V)
        if self._target == "parent":
            losses = self._divergence(logits, states.detach(), batch, labelled)
        else:
            losses = functional.cross_entropy(logits, batch["labels"][labelled], reduction="none")
        loss = (losses * batch["diff_weight"][labelled]).sum() / batch["diff_count"].sum()
        return {"loss": loss, "l_diff": loss.detach()}

    def slot_logits(self, batch: Mapping[str, Tensor], slots: Tensor) -> Tensor:
        """Logits of the chosen slots, (B, L) bool, in row order: (M, V) float32."""
        return self._project(self.states(batch)[slots])

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states of all slots, (B, L, D), 0 at padding. Those of tokens carry no gradient."""
        rows = range(len(batch["ids"]))
        if "step" not in batch:  # tokens alone
            plain = torch.zeros_like(batch["ids"])
            tokens = {"segment": plain, "anchor": torch.arange(plain.shape[1]).expand_as(plain), "step": plain}
            batch = {**batch, **{name: value.to(plain.device) for name, value in tokens.items()}}
        return torch.stack([self._row_states({name: batch[name][row] for name in ROW}) for row in rows])

    def _row_states(self, row: Mapping[str, Tensor]) -> Tensor:
        """(L, D) hidden states of one row."""
        segment, step = row["segment"], row["step"]
        attended = training_mask(segment[None], row["anchor"][None], step[None])[0]  # (L, L)
        # 1) tokens, by the parent alone
        tokens = ((segment >= 0) & (step == 0)).nonzero()[:, 0]  # (N,)
        store = TokenStore()
        with torch.no_grad():
            mask = self._additive(attended[tokens][:, tokens])[None, None]
            token_states = self._forward(row["ids"][tokens][None], row["positions"][tokens][None], mask, store)[0]
        states = token_states.new_zeros(len(step), token_states.shape[1]).index_put((tokens,), token_states)
        if not bool((step > 0).any()):
            return states
        # 2) mask blocks, which read them
        slots, valid = block_slots(row["anchor"], step)
        own = attended[slots[:, :, None], slots[:, None]] & valid[:, None]  # (A, K, K)
        mask = self._additive(torch.cat((attended[slots][..., tokens], own), -1))[:, None]  # (A, 1, K, N + K)
        block_states = self._forward(row["ids"][slots], row["positions"][slots], mask, BlockStore(store))
        return states.index_put((slots[valid],), block_states[valid])

    def _divergence(self, logits: Tensor, states: Tensor, batch: Mapping[str, Tensor], labelled: Tensor) -> Tensor:
        """KL(parent || adapter) of every labelled slot in nats, (M,).  states: (B, L, D), without gradients.

        The token in a mask slot's place, anchor + step, predicts the same next token with the parent's weights.
        """
        row = labelled.nonzero()[:, 0]
        place = (batch["anchor"] + batch["step"])[labelled]
        places, index = torch.unique(torch.stack((row, place), 1), dim=0, return_inverse=True)
        with torch.no_grad():
            expected = self._project(states[places[:, 0], places[:, 1]]).log_softmax(-1)[index]  # (M, V)
        return functional.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)

    def _project(self, states: Tensor) -> Tensor:
        """(M, D) -> (M, V) float32."""
        (backbone,) = self._backbone
        logits: Tensor = backbone.model.get_output_embeddings()(states)
        return logits.float()

    def _additive(self, attended: Tensor) -> Tensor:
        """0 where a query attends to a key, the lowest number elsewhere, in the parent's number format."""
        dtype = self._backbone[0].dtype
        return torch.zeros(attended.shape, dtype=dtype, device=attended.device).masked_fill_(
            ~attended, torch.finfo(dtype).min
        )


ROW = ("ids", "positions", "segment", "anchor", "step")
"""Tensors of a batch that the forward of one row takes."""


def block_slots(anchor: Tensor, step: Tensor) -> BlockSlots:
    """The mask blocks of a row, packed: the widest first, each where there is room first.  anchor, step: (L,)."""
    # 1) blocks by anchor
    blocks: dict[int, list[int]] = {}
    anchors = anchor.tolist()
    for slot in (step > 0).nonzero()[:, 0].tolist():
        blocks.setdefault(anchors[slot], []).append(slot)
    # 2) rows of blocks
    width, rows = int(step.max()), list[list[int]]()
    for block in sorted(blocks.values(), key=len, reverse=True):
        row = next((row for row in rows if len(row) + len(block) <= width), None)
        if row is None:
            rows.append(list(block))
        else:
            row += block
    # 3) tensors
    slots = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=step.device)
    return BlockSlots(torch.where(slots < 0, slots[:, :1], slots), slots >= 0)
