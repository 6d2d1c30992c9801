"""Training layouts: the slots that one tokenised example becomes in each training stage.

A training row is a set of lists with one entry per slot. Three of them decide the attention mask (`attention_masks`):

    segment  number of the packed example; slots attend inside their own segment only
    anchor   slot of the last token attended to
    step     0 for a token, 1.. for a slot of the mask block anchored there; higher steps attend to lower ones

Below, the example has the tokens a b c d e and the response b c d e. M is the mask token, `.` a slot without a loss.
Labels are shifted by one, as in next-token training: a slot is labelled with the token behind its own position.

Causal row and one FLUID mask block of two slots, anchored at b (stages `ar` and `fluid-*`; arXiv 2605.27387):

    slot      0  1  2  3  4    5  6      a mask block's slot of step s behind anchor i:
    id        a  b  c  d  e    M  M
    position  0  1  2  3  4    2  3        position = i + s
    label     b  c  d  e  .    d  e        label    = token i + s + 1
    anchor    0  1  2  3  4    1  1        anchor   = i
    step      0  0  0  0  0    1  2        step     = s

Clean copy and noised blocks of two tokens (stage `nbdiff`; arXiv 2512.06776). All slots of a block share one anchor and
one step, so they attend to one another and to the clean tokens before the block. The first token of a block is
predicted from the clean token before it: b from slot 0.

    slot      0  1  2  3  4    5  6    7  8      a noised block that begins at token n:
    id        a  b  c  d  e    M  M    d  M
    position  0  1  2  3  4    1  2    3  4        position = the token's own
    label     b  c  d  e  .    c  .    e  .        label    = the next token, where that one is masked
    anchor    0  1  2  3  4    0  0    2  2        anchor   = n - 1
    step      0  0  0  0  0    1  1    1  1        step     = 1

Canvas under full attention (stages `llada`, arXiv 2502.09992, and `mdlm`, 2406.07524): every slot is anchored at the
last one. Labels are not shifted.

    slot      0  1  2  3  4
    id        a  M  c  M  e
    position  0  1  2  3  4
    label     .  b  .  d  .
    anchor    4  4  4  4  4
    step      0  0  0  0  0

With `shift` a masked token's label is at the slot before it, as in next-token training (Dream, arXiv 2508.15487;
DiffuLLaMA, arXiv 2410.17891): `b . d . .` above.

Clean copy and noised blocks of two tokens under block-causal attention (stage `bd3lm`; arXiv 2503.09573). Blocks count
from the row's first token, and an end token z fills up the last one. Clean slots are anchored at the last token of
their block, so that they attend to one another and to earlier blocks. A noised block without a label is left out: here
c d, where nothing is masked. No other slot attends to it.

    slot      0  1  2  3  4  5    6  7    8  9      a noised block that begins at token n:
    id        a  b  c  d  e  z    a  M    M  M
    position  0  1  2  3  4  5    0  1    4  5        position = the token's own
    label     .  .  .  .  .  .    .  b    e  z        label    = the masked token
    anchor    1  1  3  3  5  5   -1 -1    3  3        anchor   = n - 1
    step      0  0  0  0  0  0    1  1    1  1        step     = 1

Packed row of two examples, a b c with a mask block anchored at a, and p q. Positions start anew; anchors are offset by
the slots before the example.

    slot      0  1  2  3    4  5
    id        a  b  c  M    p  q
    position  0  1  2  1    0  1
    label     b  c  .  c    q  .
    segment   0  0  0  0    1  1
    anchor    0  1  2  0    4  5
    step      0  0  0  1    0  0

Tokens come first in an example, so that anchors are their indices; the order of other slots does not matter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

IGNORE = -100
"""Label of a slot without a loss."""
MIN_NOISE_LEVEL = 1e-3
"""Smallest noise level t that a loss is divided by.  (LLaDA)"""


@dataclass(frozen=True)
class Example:
    """A tokenised data row.

    spans: half-open ranges [start, end) of the tokens to learn, ordered and disjoint.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass
class TrainingRow:
    """The slots of one training row, lists of length L; see the module's docstring for the first six.

    ar_weight, diff_weight: weight of a slot's loss in L_AR and in L_Diff.  diff_count: divisor of the mean in L_Diff.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    ar_weight: list[float] = field(default_factory=list)
    diff_weight: list[float] = field(default_factory=list)
    diff_count: float = 0.0

    def add_slot(
        self, token: int, *, position: int, label: int, anchor: int, step: int, ar: float = 0.0, diff: float = 0.0
    ) -> None:
        """Append one slot of segment 0.  ar, diff: its weights."""
        self.ids.append(token)
        self.positions.append(position)
        self.labels.append(label)
        self.segment.append(0)
        self.anchor.append(anchor)
        self.step.append(step)
        self.ar_weight.append(ar)
        self.diff_weight.append(diff)


class Layout(Protocol):
    """Builds the training row of an example. step: the training step, from 0 on."""

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow: ...


@dataclass(frozen=True)
class CausalLayout:
    """The tokens alone, with next-token labels on the response.  (stage `ar`)"""

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow:
        return causal_row(example)


@dataclass(frozen=True)
class HybridLayout:
    """FLUID's stage 1: mask blocks of random width, partly restored.  (FLUID, hybrid training)

    A token gets a mask block with chance `probability`, of width k ~ Uniform{1..k_max}. Each block draws a ratio from
    U[0, 1]; slots are restored to their token at that ratio. A share `noise` of the restored slots gets a random token
    of `random_ids` instead.

    restore: share of mask blocks with restored slots (published: all). The others hold masks only, as decoding feeds
    them.  anchors: number of mask blocks, drawn without replacement, in place of `probability`.
    depth: a slot's loss weighs depth ** (step - 1).
    """

    mask_id: int
    k_max: int
    random_ids: Sequence[int]
    probability: float = 0.5
    noise: float = 0.1
    restore: float = 1.0
    anchors: int | None = None
    depth: float = 1.0

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow:
        return with_mask_blocks(example, self, rng)

    def draw_width(self, rng: random.Random) -> int:
        """Width of one mask block."""
        return rng.randint(1, self.k_max)

    def weight(self, step: int) -> float:
        """Weight of a slot's loss."""
        return float(self.depth ** (step - 1))

    def draw_inputs(self, tokens: tuple[int, ...], rng: random.Random) -> list[int]:
        """Input ids of a mask block whose slots stand at the places of `tokens`."""
        ratio = rng.random() if self.restore == 1 or rng.random() < self.restore else 0.0
        return [self._draw_input(token, ratio, rng) for token in tokens]

    def _draw_input(self, token: int, ratio: float, rng: random.Random) -> int:
        if rng.random() >= ratio:
            return self.mask_id
        return rng.choice(self.random_ids) if rng.random() < self.noise else token


@dataclass(frozen=True)
class AllMaskLayout:
    """FLUID's stage 2: mask blocks of full width k_max, without restored slots.  (FLUID, horizon calibration)

    Gated adapters learn from it in stage 1, too.  anchors, depth: see `HybridLayout`.

    drawn: a mask block goes on behind each of its slots with chance `depth`, up to k_max, in place of falling weights.
    The loss is the same on average, from fewer slots: most of a full block's are too deep to be accepted often.

    past_end: mask blocks keep their width past the end of the response; those slots have no label. FLUID's public code
    (Oli-lab-nun/FLUID at 9093c11, models/model_head.py) feeds them with a loss of 0, which counts in the mean that K*
    is taken from. K* then grows to k_max towards the end of a response. Otherwise the mean is over labelled slots.
    """

    mask_id: int
    k_max: int
    probability: float = 0.5
    past_end: bool = False
    anchors: int | None = None
    depth: float = 1.0
    drawn: bool = False

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow:
        return with_mask_blocks(example, self, rng)

    def draw_width(self, rng: random.Random) -> int:
        """Width of one mask block."""
        width = 1 if self.drawn else self.k_max
        while width < self.k_max and rng.random() < self.depth:
            width += 1
        return width

    def weight(self, step: int) -> float:
        """Weight of a slot's loss."""
        return 1.0 if self.drawn else self.depth ** (step - 1)

    def draw_inputs(self, tokens: tuple[int, ...], rng: random.Random) -> list[int]:
        """Input ids of a mask block whose slots stand at the places of `tokens`."""
        return [self.mask_id] * len(tokens)


def causal_row(example: Example) -> TrainingRow:
    """The tokens of an example as one causal chain, with next-token labels on the response."""
    row = TrainingRow()
    learnt = places_of(example.spans)
    for i, token in enumerate(example.ids):
        if i + 1 in learnt:
            row.add_slot(token, position=i, label=example.ids[i + 1], anchor=i, step=0, ar=1.0)
        else:
            row.add_slot(token, position=i, label=IGNORE, anchor=i, step=0)
    return row


def with_mask_blocks(example: Example, layout: HybridLayout | AllMaskLayout, rng: random.Random) -> TrainingRow:
    """The causal row with mask blocks anchored at tokens before response tokens, the last prompt token included.

    A mask block ends with the response: its last labelled slot predicts the response's last token. Slots behind that
    one are left out, except under `AllMaskLayout.past_end`.
    """
    row, ids = causal_row(example), example.ids
    past_end = isinstance(layout, AllMaskLayout) and layout.past_end
    # The slot of step 1 is labelled with token anchor + 2, so the last anchor with a labelled slot is end - 3.
    last = 1 if past_end else 2
    places = [(anchor, end) for start, end in example.spans for anchor in range(max(0, start - 1), end - last)]
    chosen = None
    if layout.anchors is not None:
        chosen = set(rng.sample(range(len(places)), min(layout.anchors, len(places))))
    for number, (anchor, end) in enumerate(places):
        # 1) draw whether it has a mask block, its width, and how many of its slots have a label inside the response
        has_block = rng.random() < layout.probability if chosen is None else number in chosen
        drawn = layout.draw_width(rng) if has_block else 0
        labelled = min(drawn, end - 2 - anchor)
        # 2) labelled slots
        inputs = layout.draw_inputs(ids[anchor + 1 : anchor + 1 + labelled], rng)
        for step, token in enumerate(inputs, 1):
            place, weight = anchor + step, layout.weight(step)
            row.add_slot(token, position=place, label=ids[place + 1], anchor=anchor, step=step, diff=weight)
            row.diff_count += weight
        # 3) slots past the end
        width = drawn if past_end else labelled
        for step in range(labelled + 1, width + 1):
            row.add_slot(layout.mask_id, position=anchor + step, label=IGNORE, anchor=anchor, step=step)
    return row


def grown_length(length: int, first: int, every: int, step: int) -> int:
    """Block length at a training step, see `NoisedBlockLayout`."""
    return min(length, first << min(30, step // every)) if every else length


@dataclass(frozen=True)
class NoisedBlockLayout:
    """NBDiff: the clean copy, and beside it noised blocks, each masked at its own level t ~ U(0, 1].

    Blocks count from the start of the response. Their length grows during training:
    b(s) = min(length, first * 2^floor(s / every)). End tokens fill up the last block.

    length: tokens of a block.  first: length at step 0.  every: steps between doublings, 0 for full length from the
    start.  by_noise: weigh a masked token 1/t.  noise_level: a fixed t.
    """

    mask_id: int
    end_id: int
    length: int = 32
    first: int = 1
    every: int = 0
    by_noise: bool = False
    noise_level: float | None = None

    def block_length(self, step: int) -> int:
        """Block length at a training step."""
        return grown_length(self.length, self.first, self.every, step)

    def build(self, example: Example, rng: random.Random, step: int) -> TrainingRow:
        length = self.block_length(step)
        # 1) fill up the last response to whole blocks
        *before, (start, end) = example.spans
        filling = -(end - start) % length
        filled = Example(example.ids[:end] + (self.end_id,) * filling, (*before, (start, end)))
        # 2) the clean copy; the end tokens filled in have no label there
        row, ids = causal_row(filled), filled.ids
        # 3) the noised blocks
        for span_start, span_end in (*before, (start, len(ids))):
            for block_start in range(span_start, span_end, length):
                block = ids[block_start : min(block_start + length, span_end)]
                self._add_noised_block(row, block, block_start, rng)
        return row

    def _add_noised_block(self, row: TrainingRow, block: tuple[int, ...], start: int, rng: random.Random) -> None:
        # 1) draw the noise
        level = self.noise_level or 1.0 - rng.random()  # in (0, 1]
        weight = 1.0 / max(level, MIN_NOISE_LEVEL) if self.by_noise else 1.0
        masked = [rng.random() < level for _ in block]
        row.diff_count += len(block) if self.by_noise else sum(masked)
        # 2) the block's first token is predicted by the clean token before it, whose slot is start - 1
        if masked[0] and start > 0:
            row.diff_weight[start - 1] += weight
        # 3) the others are predicted inside the block
        for j, token in enumerate(block):
            next_is_masked = j + 1 < len(block) and masked[j + 1]
            row.add_slot(
                self.mask_id if masked[j] else token,
                position=start + j,
                label=block[j + 1] if next_is_masked else IGNORE,
                anchor=start - 1,
                step=1,
                diff=weight if next_is_masked else 0.0,
            )


def places_of(spans: Sequence[tuple[int, int]]) -> set[int]:
    """Token indices that the spans cover."""
    return {place for start, end in spans for place in range(start, end)}


def weigh_per_example(row: TrainingRow) -> TrainingRow:
    """Scale the weights in place so that every example counts the same, whatever the length of its response."""
    ar_total = sum(row.ar_weight) or 1.0
    row.ar_weight = [weight / ar_total for weight in row.ar_weight]
    row.diff_weight = [weight / (row.diff_count or 1.0) for weight in row.diff_weight]
    row.diff_count = float(row.diff_count > 0)
    return row


def pack_rows(rows: Sequence[TrainingRow]) -> TrainingRow:
    """Concatenate rows into one, a segment each. Anchors are offset, so that they name slots of the packed row."""
    packed = TrainingRow()
    for segment, row in enumerate(rows):
        offset = len(packed.ids)
        packed.ids.extend(row.ids)
        packed.positions.extend(row.positions)
        packed.labels.extend(row.labels)
        packed.segment.extend([segment] * len(row.ids))
        packed.anchor.extend(offset + anchor for anchor in row.anchor)
        packed.step.extend(row.step)
        packed.ar_weight.extend(row.ar_weight)
        packed.diff_weight.extend(row.diff_weight)
        packed.diff_count += row.diff_count
    return packed
