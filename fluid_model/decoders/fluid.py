"""FLUID, one forward a round: what was drafted is verified and the next draft is made in the same call.

A round feeds the pending token (written, not cached yet), the drafts after it, and fans of masks behind the tokens
where the drafts are likeliest to end. The causal model's own choice at each token says how many drafts were right and
what comes next; the fan behind the last right one holds the next drafts. FLUID is trained in this very layout (see
`layout`), and what was kept is cached already: attention is causal. Verified text is that of AR under the same weights,
sampled text included, since every token is chosen from the causal logits by the random number AR would use.

Legend: n active rows, S slots fed, C tokens fed (pending and drafts), F fans, M masks of a fan, K widest stride,
D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..backbone import Backbone
from ..engine.records import Request
from ..engine.strategy import Absorbed, Feed
from ..khead import KHead
from ..settings import FluidSettings
from .sampling import Draws, choose

UNLIKELY = 0.05
"""Drafts are cut where they are right up to there with less probability than this; a fan is not opened where the drafts
end with less.
"""


class FluidStrategy:
    """Rounds of one forward each. The newest token is pending, as in AR."""

    reads_prompt = True

    def __init__(self, backbone: Backbone, head: KHead, mask_id: int, settings: FluidSettings) -> None:
        self.backbone = backbone
        self.head = head
        self.mask_id = mask_id
        self.settings = settings
        self.horizon = min(settings.max_horizon, head.k_max)  # K
        self.masks = self.horizon - 1  # M: a stride is the pending token and its drafts
        self.fans = settings.fans if settings.verify else 1
        self.behind_prompt: tuple[int, ...] = (mask_id,) * self.masks
        self.widest = self.horizon + self.fans * self.masks

    def allocate(self, slots: int) -> None:
        device, widest = self.backbone.device, self.horizon
        self._tokens = torch.full((slots, widest), self.mask_id, device=device)  # pending, drafts
        self._hung = torch.zeros(slots, self.fans, dtype=torch.long, device=device)  # which token each fan hangs on
        self._shape = torch.ones(slots, 2, dtype=torch.long, device=device)  # tokens and fans of the next feed
        self._draws = Draws(slots)
        self._fed: list[list[int]] = [[] for _ in range(slots)]  # the tokens of the next feed, on the host
        self._opened = [0] * slots  # its fans

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        """hidden: (R, 1 + M, D) at the prompt's last token and the fan behind it."""
        assert hidden is not None
        for slot, request in enumerate(requests, start):
            self._draws.seed(slot, request.seed)
        draws = self._numbers(range(start, start + len(hidden)), 1 + self.masks)
        tokens, sure = self._choose(hidden, draws)
        nothing = torch.full((len(hidden),), -1, device=hidden.device)
        state = self._propose(start, hidden[:, 0], nothing, tokens, sure[:, 1:], rooms)
        return self._report(start, state, closed=not self.settings.verify)

    def plan(self, rows: int) -> Feed:
        widths = [len(self._fed[row]) + self._opened[row] * self.masks for row in range(rows)]
        slot = torch.arange(max(widths), device=self._tokens.device)  # (S,)
        count, fans = self._shape[:rows, :1], self._shape[:rows, 1:]
        real, behind = slot < count, slot - count  # (n, S) each
        fan = behind.clamp(min=0) // max(1, self.masks)
        hung = self._hung[:rows].gather(1, fan.clamp(max=self.fans - 1))
        anchor = torch.where(real, slot, torch.where(fan < fans, hung, -1))
        step = torch.where(real, 0, 1 + behind % max(1, self.masks))
        tokens = self._tokens[:rows].gather(1, slot.clamp(max=self._tokens.shape[1] - 1).expand(rows, -1))
        ids = torch.where(real, tokens, self.mask_id)
        return Feed(ids, widths, kinds=["round"] * rows, fans=(anchor, step))

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows, device = len(feed.ids), hidden.device
        widest = max(map(len, self._fed[:rows]))
        at, place = torch.arange(rows, device=device), torch.arange(widest, device=device)
        count = self._shape[:rows, 0]
        draws = self._numbers(range(rows), 2 * self.horizon)
        if self.settings.verify:
            chosen, _ = self._choose(hidden[:, :widest], draws[:, :widest])  # (n, C): what the causal model writes next
            right = (feed.ids[:, 1:widest] == chosen[:, :-1]) & (place[1:] < count[:, None])
            last = right.cumprod(1).sum(1)  # (n,) the last token kept
            pending, written = chosen[at, last], last + 1
        else:
            last, written = count - 1, torch.ones_like(count)  # what is fed was kept when it was drafted
            pending = self._choose(hidden[at, last][:, None], draws[:, :1])[0][:, 0]
        ahead = written[:, None] + torch.arange(self.masks, device=device)
        drafts, sure = self._drafts(hidden, last, draws.gather(1, ahead))  # (n, M) each
        tokens = torch.cat([pending[:, None], drafts], 1)
        return self._report(0, self._propose(0, hidden[at, last], last, tokens, sure, rooms), closed=True)

    def move(self, source: int, target: int) -> None:
        for state in (self._tokens, self._hung, self._shape):
            state[target] = state[source]
        self._draws.move(source, target)
        self._fed[target], self._opened[target] = self._fed[source], self._opened[source]

    def _numbers(self, rows: range, count: int) -> Tensor:
        """(n, count) random numbers for the next places, which greedy choice does without."""
        if self.settings.temperature == 0:
            return torch.zeros(len(rows), count, device=self.backbone.device)
        return self._draws.peek(rows, count).to(self.backbone.device)

    def _choose(self, hidden: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their probabilities. hidden: (n, C, D).  draws: (n, C).  Returns (n, C) each."""
        logits, heat = self.backbone.logits(hidden), self.settings.temperature
        if heat == 0:
            sure, tokens = logits.softmax(-1).max(-1)
            return tokens, sure
        tokens, sure = choose(logits.flatten(0, 1), draws.flatten(), heat, self.settings.top_p, "probability")
        return tokens.view(draws.shape), sure.view(draws.shape)

    def _drafts(self, hidden: Tensor, last: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """What the fan behind each row's last kept token says, and how surely: 0 where no fan was opened there.

        Drawn with the numbers that will verify them, so that drafts from the right distribution are right.
        hidden: (n, S, D).  last: (n,).  draws: (n, M).
        """
        rows, step = len(hidden), torch.arange(self.masks, device=hidden.device)
        count, fans = self._shape[:rows, :1], self._shape[:rows, 1:]
        hit = (self._hung[:rows] == last[:, None]) & (torch.arange(self.fans, device=hidden.device) < fans)  # (n, F)
        slots = count + hit.long().argmax(1, keepdim=True) * self.masks + step  # (n, M)
        slots = slots.clamp(max=hidden.shape[1] - 1)
        states = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        tokens, sure = self._choose(states, draws)
        return tokens, sure * hit.any(1, keepdim=True)

    def _propose(
        self, start: int, hidden: Tensor, last: Tensor, tokens: Tensor, sure: Tensor, rooms: list[int]
    ) -> Tensor:
        """Set what rows start.. feed next.

        hidden: (n, D) at the last token kept.  last: (n,) its place in what was fed.  tokens: (n, K) pending, drafts.
        sure: (n, M) probability of each draft.  rooms: slots left before the window ends, before that feed.
        Returns (n, 3 + K) for `_report`: last; tokens and fans to feed; tokens.
        """
        rows = slice(start, start + len(hidden))
        room = torch.tensor(rooms, device=hidden.device) - last - 1
        length = self._cut(sure, self.head.stride(hidden).to(hidden.device), room)
        self._tokens[rows] = tokens
        self._shape[rows, 0] = length + 1
        if self.masks:
            self._hung[rows], self._shape[rows, 1] = self._places(sure, length)
        else:
            self._shape[rows, 1] = 0
        return torch.cat([last[:, None], self._shape[rows], tokens], 1)

    def _cut(self, sure: Tensor, stride: Tensor, room: Tensor) -> Tensor:
        """Drafts to feed, (n,): within the K-head's stride and the window, and likely or sure enough.

        sure: (n, M).  stride, room: (n,) tokens, the pending one included.
        """
        if self.settings.verify:
            worth = sure.cumprod(1) >= UNLIKELY
        else:
            worth = (sure > self.settings.confidence).cumprod(1).bool()
        stride = stride.clamp(self.settings.min_horizon, self.horizon)
        return torch.minimum(worth.sum(1), torch.minimum(stride, room).clamp(min=1) - 1)

    def _places(self, sure: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens to hang fans on, (n, F), and how many of these are worth it, (n,).

        Unverified drafts are all kept, so the last one has the only fan.  sure: (n, M).  length: (n,) drafts.
        """
        draft = torch.arange(sure.shape[1] + 1, device=sure.device)
        if not self.settings.verify:
            return length[:, None], torch.ones_like(length)
        reached = torch.cat([torch.ones_like(sure[:, :1]), sure.cumprod(1)], 1)  # (n, M + 1) all right up to there
        onward = torch.cat([sure, torch.zeros_like(sure[:, :1])], 1).masked_fill(draft >= length[:, None], 0.0)
        ends = (reached * (1 - onward)).masked_fill(draft > length[:, None], 0.0)
        likely, where = functional.pad(ends, (0, self.fans)).topk(self.fans, dim=1)
        return where, (likely >= UNLIKELY).sum(1)

    def _report(self, start: int, state: Tensor, *, closed: bool) -> Absorbed:
        """Book on the host what was kept and what comes next. closed: whether a round has ended with this."""
        tokens: list[list[int]] = []
        keep: list[int] = []
        predicted: list[int | None] = []
        for row, (last, count, fans, *fresh) in enumerate(state.tolist(), start):
            fed, new = self._fed[row], fresh[:count]
            tokens.append(fed[1 : last + 1] + new[:1] if self.settings.verify else new)
            keep.append(last + 1)
            predicted.append(len(fed) if self.settings.verify else count)
            self._draws.take(row, len(tokens[-1]))
            self._fed[row], self._opened[row] = new, fans
        return Absorbed(tokens, keep, predicted if closed else [])
