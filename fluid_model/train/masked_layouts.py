"""Layouts of masked diffusion: each example is masked at one level t, and its masked tokens are predicted in place.

`CanvasLayout` is one canvas under full attention, `BlockCausalLayout` cuts the row into blocks. `row_layouts` has their
pictures.
"""

from __future__ import annotations

import random
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from .noise import NoiseSpec
from .row_layouts import IGNORE, Example, TrainingRow, grown_length, places_of


class MaskedTokens(NamedTuple):
    """Indices of an example's masked tokens, and the weight of each one's loss."""

    places: set[int]
    weight: float


def mask_tokens(
    learnt: AbstractSet[int], noise: NoiseSpec, t: float | None, rng: random.Random, offset: float
) -> MaskedTokens:
    """Mask the tokens to learn at the noise level t, drawn where it is None. offset: see `NoiseSpec.loss_weight`."""
    t = noise.draw_time(rng) if t is None else t
    share = noise.masked_share(t)
    return MaskedTokens({i for i in sorted(learnt) if rng.random() < share}, noise.loss_weight(t, offset))


@dataclass(frozen=True)
class CanvasLayout:
    """LLaDA and MDLM: response tokens masked at one level t a row, and predicted in place under full attention.

    A random number of end tokens follows the response, up to a canvas of `length`. They teach the model where an answer
    ends. The mean of the loss is over all response tokens, masked or not; `LossSpec.per` has other means.

    shift: the slot before a masked token predicts it; a row's first token is not masked.  noise_level: a fixed t.
    divisor_offset: see `NoiseSpec.loss_weight`.
    """

    mask_id: int
    end_id: int
    length: int = 0
    shift: bool = False
    noise_level: float | None = None
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    divisor_offset: float = 0.0

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow:
        # 1) fill up the canvas
        *before, (start, end) = example.spans
        filling = rng.randint(0, max(0, self.length - (end - start)))
        ids = example.ids[:end] + (self.end_id,) * filling
        # 2) draw the noise
        learnt = places_of((*before, (start, len(ids))))
        if self.shift:
            learnt.discard(0)  # no slot stands before the first token
        masked = mask_tokens(learnt, self.noise, self.noise_level, rng, self.divisor_offset)
        # 3) one slot per token, all anchored at the last
        row = TrainingRow(diff_count=len(learnt))
        _add_noised(row, ids, range(len(ids)), masked, self, anchor=len(ids) - 1, step=0)
        return row


@dataclass(frozen=True)
class BlockCausalLayout:
    """BD3LM: the clean copy, and beside it noised blocks, under block-causal attention (arXiv 2503.09573).

    As dLLM trains it: blocks count from the row's first token, one t holds for all blocks of a row, and end tokens that
    fill up the last block are learnt. A block may begin with tokens of the prompt, which are never masked.

    length, first, every: see `row_layouts.NoisedBlockLayout`.  shift: the slot before a masked token predicts it, also
    across blocks, where it is a noised slot.  noise_level, divisor_offset: see `CanvasLayout`.
    """

    mask_id: int
    end_id: int
    length: int = 32
    first: int = 1
    every: int = 0
    shift: bool = False
    noise_level: float | None = None
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    divisor_offset: float = 0.0

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow:
        length = grown_length(self.length, self.first, self.every, step)
        # 1) fill up the last block
        *before, (start, end) = example.spans
        ids = example.ids[:end] + (self.end_id,) * (-end % length)
        # 2) draw the noise
        learnt = places_of((*before, (start, len(ids))))
        if self.shift:
            learnt.discard(0)
        masked = mask_tokens(learnt, self.noise, self.noise_level, rng, self.divisor_offset)
        # 3) the clean copy: a block's slots are anchored at its last token
        row = TrainingRow(diff_count=len(learnt))
        for i, token in enumerate(ids):
            row.add_slot(token, position=i, label=IGNORE, anchor=i - i % length + length - 1, step=0)
        # 4) the noised blocks with a label
        for block_start in range(0, len(ids), length):
            block = range(block_start, block_start + length)
            if masked.places.intersection(i + self.shift for i in block):
                _add_noised(row, ids, block, masked, self, anchor=block_start - 1, step=1)
        return row


def _add_noised(
    row: TrainingRow,
    ids: tuple[int, ...],
    places: range,
    masked: MaskedTokens,
    layout: CanvasLayout | BlockCausalLayout,
    *,
    anchor: int,
    step: int,
) -> None:
    """Append the noised slots of some tokens. A label is at its own token's slot, or at the one before."""
    for i in places:
        token, target = layout.mask_id if i in masked.places else ids[i], i + layout.shift
        if target in masked.places:
            row.add_slot(token, position=i, label=ids[target], anchor=anchor, step=step, diff=masked.weight)
        else:
            row.add_slot(token, position=i, label=IGNORE, anchor=anchor, step=step)
