"""Rows to slots: how a row of tokens is expanded with fans of mask slots for training.  (FLUID, arXiv 2605.27387)

After the real token at position i hangs a fan of k slots: slot s (1..k) has position i + s and label x[i + s + 1]; a
real token keeps position i and label x[i + 1], the same next-token shift. Fans stand after all real tokens of their
row; `masks.fans` says who reads whom, so their order means nothing.

Legend: N tokens of a row, L slots of an expanded row, K widest fan.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

IGNORE = -100
"""Label of a slot that carries no loss."""


@dataclass(frozen=True)
class Expanded:
    """One expanded row, lists of length L. See `masks.fans` for anchor and step."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    anchor: list[int]
    step: list[int]


@dataclass(frozen=True)
class Example:
    """A tokenised row. Tokens from `start` on are the response and carry loss."""

    ids: tuple[int, ...]
    start: int


class FanRule(Protocol):
    """Draws the slots of one fan."""

    def open(self, rng: random.Random) -> int:
        """Width of the fan at the next response position, 0 for none."""

    def fill(self, truth: list[int], rng: random.Random) -> list[int]:
        """Input ids of a fan's slots, given the true tokens at their positions."""


@dataclass(frozen=True)
class HybridFans:
    """Stage 1: a fan with probability `probability`, k ~ Uniform{1..k_max}; slots restored to their true token at a
    ratio drawn per fan from U[0, 1], `noise` of those to a random token instead.
    """

    mask_id: int
    k_max: int
    random_ids: range
    probability: float = 0.5
    noise: float = 0.1

    def open(self, rng: random.Random) -> int:
        return rng.randint(1, self.k_max) if rng.random() < self.probability else 0

    def fill(self, truth: list[int], rng: random.Random) -> list[int]:
        ratio = rng.random()
        return [self._slot(token, ratio, rng) for token in truth]

    def _slot(self, token: int, ratio: float, rng: random.Random) -> int:
        if rng.random() >= ratio:
            return self.mask_id
        return rng.choice(self.random_ids) if rng.random() < self.noise else token


@dataclass(frozen=True)
class MaskFans:
    """Stage 2: a full fan of masks with probability `probability`, none restored."""

    mask_id: int
    k_max: int
    probability: float = 0.5

    def open(self, rng: random.Random) -> int:
        return self.k_max if rng.random() < self.probability else 0

    def fill(self, truth: list[int], rng: random.Random) -> list[int]:
        return [self.mask_id] * len(truth)


def plain(example: Example) -> Expanded:
    """The row without fans: next-token labels on the response."""
    n = len(example.ids)
    labels = [example.ids[i + 1] if example.start <= i + 1 < n else IGNORE for i in range(n)]
    return Expanded(list(example.ids), list(range(n)), labels, list(range(n)), [0] * n)


def expand(example: Example, rule: FanRule, rng: random.Random) -> Expanded:
    """The row with a fan after some of the tokens that a response token follows (the last prompt token is the first).

    Slots whose label would lie past the end are left out: nothing reads them and they carry no loss.
    """
    row, ids = plain(example), example.ids
    for anchor in range(max(0, example.start - 1), len(ids) - 2):
        width = min(rule.open(rng), len(ids) - 2 - anchor)
        row.ids.extend(rule.fill(list(ids[anchor + 1 : anchor + 1 + width]), rng))
        for s in range(1, width + 1):
            row.positions.append(anchor + s)
            row.labels.append(ids[anchor + s + 1])
            row.anchor.append(anchor)
            row.step.append(s)
    return row
