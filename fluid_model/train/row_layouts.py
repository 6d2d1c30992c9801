"""Rows to slots: how a row of tokens is laid out for training. `attention_masks` has the mask rule.

Every slot hangs on an anchor, the last real token it reads, and has a step: 0 for a token of the row itself, from 1 on
for what is drafted behind the anchor. Slots of one anchor read one another up to their own step. That is enough for

- fans (FLUID, arXiv 2605.27387): slot s of a fan after position i has position i + s, anchor i and step s;
- noised blocks (NBDiff, arXiv 2512.06776): all slots of a block have the position before it as anchor and step 1, so
  they read the clean tokens before the block and one another in both directions;
- a bidirectional canvas (LLaDA, arXiv 2502.09992): every token has the last position as anchor and step 0.

Order within a row means nothing. Several examples packed into one row differ in `segment` and do not see one another.

Legend: N tokens of an example, L slots of a row, K widest fan.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

IGNORE = -100
"""Label of a slot that carries no loss."""


@dataclass
class Expanded:
    """One row of slots, lists of length L. See `training_intervals` for segment, anchor and step.

    labels: the token a slot is to say.  ar, diff: how much its loss counts in L_AR and in L_Diff.
    targets: what L_Diff is a mean over.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    ar: list[float] = field(default_factory=list)
    diff: list[float] = field(default_factory=list)
    targets: float = 0.0

    def add(
        self, token: int, position: int, label: int, anchor: int, step: int, ar: float = 0.0, diff: float = 0.0
    ) -> None:
        """One slot more."""
        self.ids.append(token)
        self.positions.append(position)
        self.labels.append(label)
        self.segment.append(0)
        self.anchor.append(anchor)
        self.step.append(step)
        self.ar.append(ar)
        self.diff.append(diff)


@dataclass(frozen=True)
class Example:
    """A tokenised row. spans: half-open ranges of response tokens, which carry loss, in order and apart."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Layout(Protocol):
    """Lays an example out for one training step (counted from 0)."""

    def lay(self, example: Example, rng: random.Random, step: int) -> Expanded: ...


@dataclass(frozen=True)
class Plain:
    """The row as it is, with next-token labels on the response."""

    def lay(self, example: Example, rng: random.Random, step: int) -> Expanded:
        return plain(example)


@dataclass(frozen=True)
class HybridFans:
    """FLUID's stage 1: a fan with probability `probability`, k ~ Uniform{1..k_max}; slots restored to their true token
    at a ratio drawn per fan from U[0, 1], `noise` of those to a random one of `random_ids` instead.

    restore: share of fans this is done to (published: all); the others are masks, as rounds of one forward feed them.
    """

    mask_id: int
    k_max: int
    random_ids: Sequence[int]
    probability: float = 0.5
    noise: float = 0.1
    restore: float = 1.0

    def lay(self, example: Example, rng: random.Random, step: int) -> Expanded:
        return expand(example, self, rng)

    def open(self, rng: random.Random) -> int:
        return rng.randint(1, self.k_max) if rng.random() < self.probability else 0

    def fill(self, truth: tuple[int, ...], rng: random.Random) -> list[int]:
        ratio = rng.random() if self.restore == 1 or rng.random() < self.restore else 0.0
        return [self._slot(token, ratio, rng) for token in truth]

    def _slot(self, token: int, ratio: float, rng: random.Random) -> int:
        if rng.random() >= ratio:
            return self.mask_id
        return rng.choice(self.random_ids) if rng.random() < self.noise else token


@dataclass(frozen=True)
class MaskFans:
    """FLUID's stage 2: a full fan of masks with probability `probability`, none restored.

    past_end: slots past the end of the response are laid too, with no label. FLUID's public code (Oli-lab-nun/FLUID at
    9093c11, models/model_head.py) feeds them so: their loss is 0 and counts in the mean that K* is taken from, so that
    K* grows to k_max towards the end of a response. Without it the mean is over slots that have a token to say.
    """

    mask_id: int
    k_max: int
    probability: float = 0.5
    past_end: bool = False

    def lay(self, example: Example, rng: random.Random, step: int) -> Expanded:
        return expand(example, self, rng)

    def open(self, rng: random.Random) -> int:
        return self.k_max if rng.random() < self.probability else 0

    def fill(self, truth: tuple[int, ...], rng: random.Random) -> list[int]:
        return [self.mask_id] * len(truth)


def plain(example: Example) -> Expanded:
    """The row without drafts: next-token labels on the response."""
    row, ids = Expanded(), example.ids
    wanted = {place for start, end in example.spans for place in range(start, end)}
    for i, token in enumerate(ids):
        loss = i + 1 in wanted
        row.add(token, i, ids[i + 1] if loss else IGNORE, anchor=i, step=0, ar=float(loss))
    return row


def expand(example: Example, rule: HybridFans | MaskFans, rng: random.Random) -> Expanded:
    """The row with a fan after some of the tokens that a response token follows (the last prompt token is the first).

    A slot's label is the token after its position, the same next-token shift as a real token's. Slots whose label would
    lie past the end of the response are left out: nothing reads them and they carry no loss.  (but see `MaskFans`)
    """
    row, ids = plain(example), example.ids
    past = isinstance(rule, MaskFans) and rule.past_end
    for start, end in example.spans:
        for anchor in range(max(0, start - 1), end - (1 if past else 2)):
            opened = rule.open(rng)
            width = min(opened, end - 2 - anchor)  # slots with a token to say
            fan = rule.fill(ids[anchor + 1 : anchor + 1 + width], rng)
            for s, token in enumerate(fan, 1):
                row.add(token, anchor + s, ids[anchor + s + 1], anchor, s, diff=1.0)
            for s in range(width + 1, (opened if past else width) + 1):
                row.add(rule.mask_id, anchor + s, IGNORE, anchor, s)
            row.targets += width
    return row


@dataclass(frozen=True)
class Blocks:
    """NBDiff's noised and clean copies side by side: t ~ U[0, 1] per block masks its tokens.

    A noised block reads itself in both directions and the clean tokens before it. Slot j says token j + 1 of its block;
    a block's first token is said by the clean token before it, as in decoding. Blocks count from the start of the
    response and grow during training: b(s) = min(length, first * 2^floor(s / every)). The last block is filled up with
    end tokens.

    length: of a block, tokens.  first: length at step 0.  every: steps between doublings, 0 for none.
    by_noise: weigh a masked token 1/t.  level: a fixed t.
    """

    mask_id: int
    end_id: int
    length: int = 32
    first: int = 1
    every: int = 0
    by_noise: bool = False
    level: float | None = None

    def size(self, step: int) -> int:
        """Block length at a training step."""
        return min(self.length, self.first << min(30, step // self.every)) if self.every else self.length

    def lay(self, example: Example, rng: random.Random, step: int) -> Expanded:
        size = self.size(step)
        (*before, (start, end)) = example.spans
        filled = Example(example.ids[:end] + (self.end_id,) * (-(end - start) % size), (*before, (start, end)))
        row, ids = plain(filled), filled.ids
        for span in (*before, (start, len(ids))):
            for low in range(span[0], span[1], size):
                self._noise(row, ids[low : min(low + size, span[1])], low, rng)
        return row

    def _noise(self, row: Expanded, block: tuple[int, ...], low: int, rng: random.Random) -> None:
        level = self.level or 1.0 - rng.random()  # in (0, 1]
        weight = 1.0 / max(level, LEAST_NOISE) if self.by_noise else 1.0
        masked = [rng.random() < level for _ in block]
        row.targets += len(block) if self.by_noise else sum(masked)
        if masked[0] and low > 0:  # said by the clean token before the block, whose slot is low - 1
            row.diff[low - 1] += weight
        for j, token in enumerate(block):
            said = j + 1 < len(block) and masked[j + 1]
            row.add(
                self.mask_id if masked[j] else token, low + j, block[j + 1] if said else IGNORE,
                anchor=low - 1, step=1, diff=weight if said else 0.0,
            )  # fmt: skip


LEAST_NOISE = 1e-3
"""Smallest t a loss is divided by.  (LLaDA)"""


@dataclass(frozen=True)
class Canvas:
    """LLaDA: t ~ U[0, 1] per row masks response tokens, which are to be said where they stand; all read all.

    The response is followed by a random number of end tokens, up to a canvas of `length`, so that the model learns
    where an answer ends (LLaDA's guidelines, ML-GSAI/LLaDA at b7e6c35, fill every row up to the longest of its batch).
    Weight of a masked token: 1/t. What its mean is over, `LossSpec.per` says.  level: a fixed t.
    """

    mask_id: int
    end_id: int
    length: int = 0
    level: float | None = None

    def lay(self, example: Example, rng: random.Random, step: int) -> Expanded:
        (*before, (start, end)) = example.spans
        ids = example.ids[:end] + (self.end_id,) * rng.randint(0, max(0, self.length - (end - start)))
        level = self.level or LEAST_NOISE + (1.0 - LEAST_NOISE) * rng.random()
        wanted = {place for low, high in (*before, (start, len(ids))) for place in range(low, high)}
        row = Expanded(targets=len(wanted))
        for i, token in enumerate(ids):
            masked = i in wanted and rng.random() < level
            row.add(
                self.mask_id if masked else token, i, token if masked else IGNORE,
                anchor=len(ids) - 1, step=0, diff=1.0 / level if masked else 0.0,
            )  # fmt: skip
        return row


def by_row(row: Expanded) -> Expanded:
    """Weights such that every example counts the same, however long its response is."""
    total = sum(row.ar) or 1.0
    row.ar = [weight / total for weight in row.ar]
    row.diff = [weight / (row.targets or 1.0) for weight in row.diff]
    row.targets = float(row.targets > 0)
    return row


def pack(rows: list[Expanded]) -> Expanded:
    """Several rows as one, kept apart by segment. Anchors count from the start of the whole: a real one is its slot's
    place.
    """
    whole = Expanded()
    for number, row in enumerate(rows):
        before = len(whole.ids)
        for name in ("ids", "positions", "labels", "step", "ar", "diff"):
            getattr(whole, name).extend(getattr(row, name))
        whole.anchor.extend(before + anchor for anchor in row.anchor)
        whole.segment.extend([number] * len(row.ids))
        whole.targets += row.targets
    return whole
