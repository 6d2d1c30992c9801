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
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, takewhile

import torch
from torch import Tensor

from ..backbone import Backbone
from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..khead import KHead
from ..masks import Fans
from ..settings import FluidSettings
from .sampling import Draws, choose
from .tree import Draft, Tree, grow

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

    def worth(self, hit: float, price: float, most: int) -> int:
        """Masks of a fan that is behind the last right token with probability `hit`, `most` at most.

        Its j-th one is used if j drafts come true, each as often as they did so far.
        """
        true = 1 - self.rounds / self.written
        return 0 if hit <= price or true <= 0 else min(most, int(math.log(price / hit) / math.log(true)))


class FluidStrategy:
    """Rounds of one forward each. The newest token is pending, as in AR."""

    reads_prompt = True

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
        self.widest = max(2 * self.horizon, min(self._budget // slots, MOST_SLOTS))
        self._rows = [_Row() for _ in range(slots)]
        self._draws = Draws(slots)
        fresh, most = _Row(), self.horizon - 1
        masks = fresh.worth(1.0, fresh.price(self._budget, slots), most) if self.settings.verify else most
        self.behind_prompt = (self.mask_id,) * masks

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        """hidden: (R, 1 + M, D) at the prompt's last token and the fan behind it."""
        assert hidden is not None
        for slot, request in enumerate(requests, start):
            self._rows[slot] = _Row()
            self._draws.seed(slot, request.seed)
        places = [list(range(hidden.shape[1]))] * len(requests)
        tokens, rejected = [], []
        for slot, (said, room) in enumerate(zip(self._say(start, hidden, places), rooms, strict=True), start):
            unsure = self._prepare(self._rows[slot], said, 0, range(1, hidden.shape[1]), room)
            tokens.append(self._rows[slot].tokens[: 1 if self.settings.verify else None])
            rejected.append((len(tokens[-1]), unsure))
            self._draws.take(slot, len(tokens[-1]))
        predicted = [] if self.settings.verify else [len(fresh) for fresh in tokens]
        return Absorbed(tokens, [0] * len(requests), [*predicted], rejected=rejected)

    def plan(self, rows: int) -> Feed:
        """Tokens first, then the fans in the order of what they hang on."""
        active = self._rows[:rows]
        widths = [row.slots for row in active]
        found = []
        for row, width in zip(active, widths, strict=True):
            padding, count, depths = max(widths) - width, len(row.tokens), row.tree.depths
            ids = row.tokens + [self.mask_id] * (width - count + padding)
            anchors = [*range(count), *(at for at, masks in enumerate(row.masks) for _ in range(masks))]
            steps = [0] * count + [step for masks in row.masks for step in range(1, masks + 1)]
            places = [depths[at] + step for at, step in zip(anchors, steps, strict=True)] + [0] * padding
            until = row.tree.ends + [0] * (len(ids) - count)
            found.append((ids, anchors + [-1] * padding, steps + [0] * padding, places, until))
        fed, *fans = torch.tensor(found, device=self.backbone.device).unbind(1)  # (n, S) each
        return Feed(fed, widths, kinds=["round"] * rows, fans=Fans(*fans))

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        tokens, kept, rejected = [], [], []
        predicted: list[int | None] = []
        active = self._rows[: len(rooms)]
        answers = self._say(0, hidden, [self._places(row) for row in active])
        for slot, (row, said, room) in enumerate(zip(active, answers, rooms, strict=True)):
            tree, path = row.tree, self._path(row, said)
            behind = len(tree.tokens) + sum(row.masks[: path[-1]])
            row.rounds, row.fed = row.rounds + 1, row.fed + row.slots
            fan = range(behind, behind + row.masks[path[-1]])
            unsure = self._prepare(row, said, path[-1], fan, room - len(path))
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

    def _places(self, row: _Row) -> list[int]:
        """For each slot of a row the place of what it says, counted from the first one not written yet."""
        first = 0 if self.settings.verify else 1 - len(row.tokens)  # unverified drafts are written already
        depths = row.tree.depths
        places = [max(0, first + depth) for depth in depths]
        fans = zip(depths, row.masks, strict=True)
        return places + [first + depth + step for depth, masks in fans for step in range(1, masks + 1)]

    def _say(self, start: int, hidden: Tensor, places: list[list[int]]) -> list[_Said]:
        """What slots say: one transfer to the host.

        hidden: (n, S, D).  places: of each slot's token; a row's random number of that place draws it.
        """
        slots, heat = hidden.shape[1], self.settings.temperature
        fed = [row * slots + slot for row, where in enumerate(places) for slot in range(len(where))]  # less padding
        hidden = hidden.flatten(0, 1)
        hidden = hidden if len(fed) == len(hidden) else hidden[torch.tensor(fed, device=hidden.device)]  # (fed, D)
        logits = self.backbone.logits(hidden)  # (fed, V)
        if heat == 0:
            tokens = logits.argmax(-1)
            sure, drafts = logits.softmax(-1).topk(min(self._candidates, logits.shape[-1]))  # (fed, candidates) each
        else:
            tokens, sure = choose(logits, self._numbers(start, places), heat, self.settings.top_p, "probability")
            sure, drafts = sure[:, None], tokens[:, None]
        strides = self.head.stride(hidden).to(tokens.device)
        ids, likely = _to_host(torch.cat([tokens[:, None], strides[:, None], drafts], -1), sure)
        return [
            _Said([i[0] for i in ids[a:b]], [i[1] for i in ids[a:b]], [i[2:] for i in ids[a:b]], likely[a:b])
            for a, b in pairwise(accumulate(map(len, places), initial=0))
        ]

    def _path(self, row: _Row, said: _Said) -> list[int]:
        """The tokens that are kept: those the model says itself, or all where nothing is verified."""
        return row.tree.walk(said.tokens) if self.settings.verify else row.tree.likeliest

    def _numbers(self, start: int, places: list[list[int]]) -> Tensor:
        """The random numbers of these places, row after row."""
        ahead = self._draws.peek(range(start, start + len(places)), 2 * self.horizon)
        found = [each[torch.tensor(where)] for each, where in zip(ahead, places, strict=True)]
        return torch.cat(found).to(self.backbone.device)

    def _prepare(self, row: _Row, said: _Said, last: int, fan: range, room: int) -> list[int]:
        """Set what a row feeds next: the token said at slot `last`, what the fan behind it drafted, and new fans.

        Drafts stay within the K-head's stride and the window.  fan: its slots.  room: slots before the window ends.
        Returns drafts within the stride that the confidence threshold dropped, where nothing is verified.
        """
        stride = min(max(said.strides[last], self.settings.min_horizon), self.horizon, max(room, 1))
        drafts = [said.drafts(slot) for slot in fan[: stride - 1]]
        if not self.settings.verify:  # what is drafted is kept, so slots decide over text: all, whatever they cost
            sure = takewhile(lambda draft: draft[0][1] > self.settings.confidence, drafts)
            row.tree = Tree.chain([said.tokens[last], *(draft[0][0] for draft in sure)])
            row.masks = [0] * (len(row.tokens) - 1) + [self.horizon - 1]
            return [draft[0][0] for draft in drafts[len(row.tokens) - 1 :]]
        price = row.price(self._budget, self._slots)
        row.tree = grow(said.tokens[last], drafts, price, self.widest // 2)
        row.masks, left = [], self.widest - len(row.tokens)
        for hit in row.tree.last:
            row.masks.append(row.worth(hit, price, min(left, self.horizon - 1)))
            left -= row.masks[-1]
        return []


def _to_host(ids: Tensor, sure: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Two tables of as many lines, in one transfer: the latter's float32 travel as the bits of integers."""
    width = ids.shape[1]
    both = torch.cat([ids, sure.float().view(torch.int32)], -1).cpu()
    return both[:, :width].tolist(), both[:, width:].to(torch.int32).view(torch.float32).tolist()


def _rejected(tree: Tree, likeliest: list[int], path: list[int]) -> tuple[int, list[int]]:
    """How much of the likeliest text came true, and the rest of it."""
    right = sum(map(operator.eq, path, likeliest))
    return right - 1, [tree.tokens[node] for node in likeliest[right:]]


@dataclass(frozen=True)
class _Said:
    """What the slots of a row say: the token each would write next, the K-head's stride from there, and the likeliest
    tokens with how sure they are, (slots, candidates) each, the surest first.
    """

    tokens: list[int]
    strides: list[int]
    likeliest: list[list[int]]
    sure: list[list[float]]

    def drafts(self, slot: int) -> list[Draft]:
        """What a slot drafts."""
        return list(zip(self.likeliest[slot], self.sure[slot], strict=True))
