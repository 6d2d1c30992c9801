"""What prompts begin with in common, so that it is read once: few-shot examples above all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST = 32
"""Tokens from which on a beginning is worth a forward of its own."""


@dataclass(frozen=True)
class Group:
    """Prompts that begin alike. length: tokens they share, 0 if they share too few.  members: places, longest first."""

    length: int
    members: tuple[int, ...]


def group(prompts: Sequence[tuple[int, ...]], own: Sequence[int]) -> list[Group]:
    """Prompts grouped by what they begin with, the group of the longest first.

    own: tokens at each prompt's end that it must keep to itself, 1 at least.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    found: list[tuple[int, list[int]]] = []
    for before, place in zip([None, *order], order, strict=False):
        most = len(prompts[place]) - own[place]
        if before is not None:
            shared, members = found[-1]
            new = min(shared, most, common(prompts[before], prompts[place]))
            if new >= SHORTEST and (len(members) == 1 or 2 * new >= shared):
                found[-1] = (new, [*members, place])
                continue
        found.append((most, [place]))
    alone = [place for _, members in found if len(members) == 1 for place in members]
    groups = [(length, members) for length, members in found if len(members) > 1] + ([(0, alone)] if alone else [])
    ordered = [Group(length, tuple(sorted(members, key=lambda i: -len(prompts[i])))) for length, members in groups]
    return sorted(ordered, key=lambda each: -len(prompts[each.members[0]]))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens two prompts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared at once, so that long prompts cost little
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
