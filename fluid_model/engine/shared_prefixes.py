"""Prefix sharing: prompts that begin alike, few-shot examples above all, prefill that prefix once.

The batch-mode case of prefix caching (as in PagedAttention, Kwon et al. 2023, and RadixAttention, Zheng et al. 2023):
all prompts are known at the start, so that sorting them puts those with a common prefix side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_PREFIX = 32
"""Tokens from which on a shared prefix is worth a forward of its own."""


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts that share a prefix. length: of the prefix in tokens, 0 without one.  members: prompts by index, the
    longest first.
    """

    length: int
    members: tuple[int, ...]


def group(prompts: Sequence[tuple[int, ...]], own: Sequence[int]) -> list[PrefixGroup]:
    """Partition prompts by shared prefix, the group of the longest prompt first.

    own: tokens at each prompt's end that it must feed itself, 1 at least.
    """
    # 1) Grow groups over the prompts in lexicographic order, where common prefixes are neighbours.
    lengths: list[int] = []
    groups: list[list[int]] = []
    previous: tuple[int, ...] | None = None
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        prompt = prompts[index]
        sharable = len(prompt) - own[index]
        joins = False
        if previous is not None:
            prefix = min(lengths[-1], sharable, common_prefix(previous, prompt))
            # A third prompt joins only if at least half of the prefix of those before it is left.
            joins = prefix >= MIN_PREFIX and (len(groups[-1]) == 1 or 2 * prefix >= lengths[-1])
        if joins:
            lengths[-1] = prefix
            groups[-1].append(index)
        else:
            lengths.append(sharable)
            groups.append([index])
        previous = prompt

    # 2) Prompts without a partner make one group, without a prefix.
    shared: list[tuple[int, list[int]]] = []
    alone: list[int] = []
    for length, members in zip(lengths, groups, strict=True):
        if len(members) > 1:
            shared.append((length, members))
        else:
            alone += members
    if alone:
        shared.append((0, alone))

    # 3) Longest first, groups and members: forwards of prompts of like length waste little padding.
    ordered: list[PrefixGroup] = []
    for length, members in shared:
        members.sort(key=lambda index: -len(prompts[index]))
        ordered.append(PrefixGroup(length, tuple(members)))
    return sorted(ordered, key=lambda each: -len(prompts[each.members[0]]))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices costs little even for long prompts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
