"""FLUID, one forward a round: what was drafted is verified and the next draft is made in the same call.

A round feeds the pending token (written, not cached yet), a tree of drafts after it, and fans of masks behind the
tokens where the drafts may end. The causal model's own choice at each token says which drafts were right and what comes
next; the fan behind the last right one holds the next drafts. FLUID is trained in this very layout (see `layout`), and
what was kept is cached already: attention is causal. Verified text is that of AR under the same weights, sampled text
included, since every token is chosen from the causal logits by the random number AR would use.

Where drafts are verified, a slot is fed if it is likelier to be used than it is dear. What it costs follows from the
device's slot budget and from what a forward brings (`_Row.price`); that a draft is used, from the probabilities of the
drafts up to it; that a fan's slot is used, from where the drafts may end and from how many came true so far. What a fan
says of one place does not know what stands at the places before it, so every text of a tree draws on the same ones.

Legend: n active rows, S slots fed, M masks of a fan, K widest stride, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.records import DraftPolicy, Request
from ..engine.strategy import Absorbed, Feed
from ..forward.attention_masks import MAX_STEPS, NEVER, AttentionIntervals
from ..forward.backbone import Backbone
from ..forward.khead import KHead
from ..settings import FluidSettings
from .draft_tree import Draft, Tree, grow
from .sampling import Draws, choose, likeliest, surest

CHEAPEST, DEAREST = 0.001, 0.9
"""Bounds of a slot's price in tokens."""
MOST_SLOTS = 1024
"""What a row feeds at most in one forward, however large the budget is."""
BEFORE = 4
"""Rounds' worth of experience a row begins with: of ROUND_TOKENS written and ROUND_SLOTS fed, the last draft wrong."""
ROUND_TOKENS, ROUND_SLOTS = 2.5, 12.0


@dataclass
class _Row:
    """What a row feeds next, and how its rounds went so far.

    tree: the pending token and drafts.  masks: of the fan behind each of these.
    rounds, written, fed: counts of rounds, tokens and slots, with what a row begins with.
    """

    tree: Tree = field(default_factory=Tree)
    masks: list[int] = field(default_factory=list)
    rounds: float = BEFORE
    written: float = BEFORE * ROUND_TOKENS
    fed: float = BEFORE * ROUND_SLOTS

    @property
    def tokens(self) -> list[int]:
        return self.tree.tokens

    @property
    def slots(self) -> int:
        return len(self.tokens) + sum(self.masks)

    def price(self, budget: float, rows: int) -> float:
        """What one more slot costs, in tokens, where n rows like this one share a forward.

        A forward of s slots takes 1 + s / budget as long as an empty one: a slot more takes 1 / budget, in which
        n g / (1 + n S / budget) tokens would have been written, g and S being the row's own averages.
        """
        tokens, slots = self.written / self.rounds, self.fed / self.rounds
        return min(max(rows * tokens / (budget + rows * slots), CHEAPEST), DEAREST)

    def fans(self, hits: Sequence[float], price: float, widest: int, left: int) -> list[int]:
        """Masks of each token's fan, `widest` at most, `left` all together.  hits: how likely each is right and last.

        The j-th mask of a fan is used if j drafts come true, each as often as they did so far.
        """
        true, found = 1 - self.rounds / self.written, []
        for hit in hits:
            worth = 0 if hit <= price or true <= 0 else int(math.log(price / hit) / math.log(true))
            found.append(min(worth, left, widest))
            left -= found[-1]
        return found


class FluidStrategy:
    """Rounds of one forward each. The newest token is pending, as in AR."""

    reads_prompt = True
    draft_policy: DraftPolicy | None = None

    def __init__(self, backbone: Backbone, head: KHead, mask_id: int, settings: FluidSettings) -> None:
        self.backbone = backbone
        self.head = head
        self.mask_id = mask_id
        self.settings = settings
        self.horizon = min(settings.max_horizon, head.k_max)  # K
        self.widest = 2 * self.horizon
        self._candidates = settings.candidates if settings.verify and settings.temperature == 0 else 1
        self._budget = settings.slot_budget or (backbone.slot_budget if settings.verify else 1)

    def allocate(self, slots: int) -> None:
        self._slots = slots
        self.draft_policy = DraftPolicy(self._budget, slots) if self.settings.verify else None
        self.widest = max(2 * self.horizon, min(self._budget // slots, MOST_SLOTS))
        self._rows = [_Row() for _ in range(slots)]
        self._draws = Draws(slots)
        fresh, most = _Row(), self.horizon - 1
        (masks,) = fresh.fans([1.0], fresh.price(self._budget, slots), most, most) if self.settings.verify else [most]
        self.behind_prompt = (self.mask_id,) * masks

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        """hidden: (R, 1 + M, D) at the prompt's last token and the fan behind it."""
        assert hidden is not None
        masks, rows = hidden.shape[1] - 1, slice(start, start + len(requests))
        self._rows[rows] = [_Row(Tree.chain(request.prompt[-1:]), [masks]) for request in requests]
        for slot, request in enumerate(requests, start):
            self._draws.seed(slot, request.seed)
        tokens, rejected = [], []
        answers = self._say(start, hidden, self._rows[rows])
        for slot, (said, room) in enumerate(zip(answers, rooms, strict=True), start):
            unsure = self._prepare(self._rows[slot], said, 0, room)
            tokens.append(self._rows[slot].tokens[: 1 if self.settings.verify else None])
            rejected.append((len(tokens[-1]), unsure))
            self._draws.take(slot, len(tokens[-1]))
        predicted = [] if self.settings.verify else [len(fresh) for fresh in tokens]
        return Absorbed(tokens, [0] * len(requests), [*predicted], rejected=rejected)

    def plan(self, rows: int) -> Feed:
        """Tokens first, then the fans in the order of what they hang on."""
        active = self._rows[:rows]
        widths = [row.slots for row in active]
        widest, found = max(widths), []
        for row, width in zip(active, widths, strict=True):
            count, padding, places = len(row.tokens), [0] * (widest - width), [*row.tree.depths]
            order, until = [*range(0, count * MAX_STEPS, MAX_STEPS)], [end * MAX_STEPS for end in row.tree.ends]
            for at, masks in enumerate(row.masks):
                if masks:
                    order += range(at * MAX_STEPS + 1, at * MAX_STEPS + masks + 1)
                    until += [(at + 1) * MAX_STEPS] * masks
                    places += range(places[at] + 1, places[at] + masks + 1)
            ids = row.tokens + [self.mask_id] * (widest - count)
            found.append((ids, order + padding, until + [NEVER] * len(padding), places + padding))
        fed, *intervals = torch.from_numpy(np.array(found)).to(self.backbone.device).unbind(1)  # (n, S) each
        return Feed(fed, widths, kinds=["round"] * rows, intervals=AttentionIntervals(*intervals))

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        tokens, kept, rejected = [], [], []
        predicted: list[int | None] = []
        active = self._rows[: len(rooms)]
        answers = self._say(0, hidden, active)
        for slot, (row, said, room) in enumerate(zip(active, answers, rooms, strict=True)):
            tree, path = row.tree, self._path(row, said)
            row.rounds, row.fed = row.rounds + 1, row.fed + row.slots
            unsure = self._prepare(row, said, path[-1], room - len(path))
            if self.settings.verify:
                fresh, likeliest = [*(tree.tokens[node] for node in path[1:]), row.tokens[0]], tree.likeliest
                predicted.append(len(likeliest))
                rejected.append(_rejected(tree, likeliest, path))
            else:
                fresh = [*row.tokens]
                predicted.append(len(fresh))
                rejected.append((len(fresh), unsure))
            row.written += len(fresh)
            self._draws.take(slot, len(fresh))
            tokens.append(fresh)
            kept.append(path)
        return Absorbed(tokens, list(map(len, kept)), predicted, rejected=rejected, kept=kept)

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]
        self._draws.move(source, target)

    def _say(self, start: int, hidden: Tensor, rows: Sequence[_Row]) -> list[_Said]:
        """What the slots of rows start.. say, in one transfer to the host.  hidden: (n, S, D)."""
        slots = hidden.shape[1]
        counts, masks = [len(row.tokens) for row in rows], [sum(row.masks) for row in rows]
        fed = [at for row, count in enumerate(counts) for at in range(row * slots, row * slots + count)]
        known = len(fed)
        for row, (count, more) in enumerate(zip(counts, masks, strict=True)):
            fed += range(row * slots + count, row * slots + count + more)
        hidden = hidden.flatten(0, 1)
        if len(rows) > 1 or len(fed) < slots:  # tokens of all rows, then their masks, less padding
            hidden = hidden.index_select(0, torch.tensor(fed, device=hidden.device))  # (fed, D)
        logits = self.backbone.logits(hidden)  # (fed, V)
        if self.settings.temperature == 0:
            tokens = likeliest(logits[:known])
            drafts, sure = surest(logits[known:], min(self._candidates, logits.shape[-1]))
        else:
            numbers, heat = self._numbers(start, rows), self.settings.temperature
            chosen, certain = choose(logits, numbers, heat, self.settings.top_p, "probability")
            tokens, drafts, sure = chosen[:known], chosen[known:, None], certain[known:, None]
        strides = self.head.stride(hidden[:known]).to(tokens.device)
        tables = _to_host((tokens, strides, drafts, sure), packed=hidden.device.type != "cpu")
        found, at, behind = [], 0, 0
        for count, more in zip(counts, masks, strict=True):
            upto, end = at + count, behind + more
            found.append(_Said(*(table[at:upto] for table in tables[:2]), *(table[behind:end] for table in tables[2:])))
            at, behind = upto, end
        return found

    def _path(self, row: _Row, said: _Said) -> list[int]:
        """The tokens that are kept: those the model says itself, or all where nothing is verified."""
        return row.tree.walk(said.tokens) if self.settings.verify else row.tree.likeliest

    def _numbers(self, start: int, rows: Sequence[_Row]) -> Tensor:
        """The random numbers of the places that slots speak of, counted from the first one not written yet: those of
        the tokens of all rows, then those of their masks.
        """
        ahead = self._draws.peek(range(start, start + len(rows)), 2 * self.horizon)
        first = [0 if self.settings.verify else 1 - len(row.tokens) for row in rows]  # drafts may be written already
        places = [
            (number, max(0, first[number] + depth)) for number, row in enumerate(rows) for depth in row.tree.depths
        ]
        for number, row in enumerate(rows):
            fans = zip(row.tree.depths, row.masks, strict=True)
            places += [(number, first[number] + at + step) for at, masks in fans for step in range(1, masks + 1)]
        which, where = torch.tensor(places).unbind(1)
        return ahead[which, where].to(self.backbone.device)

    def _prepare(self, row: _Row, said: _Said, last: int, room: int) -> list[int]:
        """Set what a row feeds next: the token said at slot `last`, what the fan behind it drafted, and new fans.

        Drafts stay within the K-head's stride and the window.  room: slots before the window ends.
        Returns drafts within the stride that the confidence threshold dropped, where nothing is verified.
        """
        token, stride = said.tokens[last], said.strides[last]
        stride = min(max(stride, self.settings.min_horizon), self.horizon, max(room, 1), row.masks[last] + 1)
        behind = sum(row.masks[:last])
        drafts = [said.drafts(mask) for mask in range(behind, behind + stride - 1)]
        if not self.settings.verify:  # what is drafted is kept, so slots decide over text: all, whatever they cost
            sure = takewhile(lambda draft: draft[0][1] > self.settings.confidence, drafts)
            row.tree = Tree.chain([token, *(draft[0][0] for draft in sure)])
            row.masks = [0] * (len(row.tokens) - 1) + [self.horizon - 1]
            return [draft[0][0] for draft in drafts[len(row.tokens) - 1 :]]
        price = row.price(self._budget, self._slots)
        row.tree = grow(token, drafts, price, self.widest // 2)
        row.masks = row.fans(row.tree.last, price, self.horizon - 1, self.widest - len(row.tokens))
        return []


def _to_host(tables: Sequence[Tensor], *, packed: bool) -> list[list[Any]]:
    """Tables as lists. packed: in one transfer, where float32 travel as the bits of integers."""
    if not packed:
        return [table.tolist() for table in tables]
    whole = [table.view(torch.int32) if table.is_floating_point() else table for table in tables]
    parts = torch.split(torch.cat([table.flatten() for table in whole]).cpu(), [table.numel() for table in whole])
    found = [part.to(table.dtype).view(table.shape) for part, table in zip(parts, whole, strict=True)]
    return [part.view(table.dtype).tolist() for part, table in zip(found, tables, strict=True)]


def _rejected(tree: Tree, likeliest: list[int], path: list[int]) -> tuple[int, list[int]]:
    """How much of the likeliest text came true, and the rest of it."""
    right = sum(map(operator.eq, path, likeliest))
    return right - 1, [tree.tokens[node] for node in likeliest[right:]]


@dataclass(frozen=True)
class _Said:
    """What a row says: of each token what follows it and the K-head's stride from there; of each mask the likeliest
    tokens and how sure they are, (masks, candidates) each, the surest first.
    """

    tokens: list[int]
    strides: list[int]
    likeliest: list[list[int]]
    sure: list[list[float]]

    def drafts(self, mask: int) -> list[Draft]:
        """What a mask drafts."""
        return list(zip(self.likeliest[mask], self.sure[mask], strict=True))
