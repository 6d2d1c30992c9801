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
        self.masks = settings.max_horizon - 1  # M: a stride is the pending token and its drafts
        self.fans = settings.fans if settings.verify else 1
        self.widest = settings.max_horizon + self.fans * self.masks

    def allocate(self, slots: int) -> None:
        device, widest = self.backbone.device, self.settings.max_horizon
        self._tokens = torch.full((slots, widest), self.mask_id, device=device)  # pending, drafts
        self._fan_at = torch.zeros(
            slots, self.fans, dtype=torch.long, device=device
        )  # index of the token each hangs on
        self._shape = torch.ones(slots, 2, dtype=torch.long, device=device)  # tokens and fans of the next feed
        self._draws = Draws(slots)
        self._fed: list[list[int]] = [[] for _ in range(slots)]  # the tokens of the next feed, on the host
        self._opened = [0] * slots  # its fans

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        """The prompt's last hidden state gives the pending token; drafts come with the first round."""
        assert hidden is not None
        for slot, request in enumerate(requests, start):
            self._draws.seed(slot, request.seed)
        rows = range(start, start + len(hidden))
        pending, _ = self._choose(hidden[:, None], self._numbers(rows, 1))  # (R, 1)
        opened = min(1, self.masks)
        self._tokens[start : rows.stop, :1] = pending
        self._fan_at[start : rows.stop] = 0
        self._shape[start : rows.stop] = torch.tensor([1, opened], device=hidden.device)
        tokens: list[list[int]] = pending.tolist()
        for slot, fed in enumerate(tokens, start):
            self._draws.take(slot, 1)
            self._fed[slot], self._opened[slot] = fed, opened
        return Absorbed(tokens, keep=[0] * len(tokens))

    def plan(self, rows: int) -> Feed:
        widths = [len(self._fed[row]) + self._opened[row] * self.masks for row in range(rows)]
        slot = torch.arange(max(widths), device=self._tokens.device)  # (S,)
        count, fans = self._shape[:rows, :1], self._shape[:rows, 1:]
        real, behind = slot < count, slot - count  # (n, S) each
        fan = behind.clamp(min=0) // max(1, self.masks)
        hangs = self._fan_at[:rows].gather(1, fan.clamp(max=self.fans - 1))
        used = ~real & (fan < fans)
        anchor = torch.where(real, slot, torch.where(used, hangs, -1))
        step = torch.where(real, 0, 1 + behind % max(1, self.masks))
        tokens = self._tokens[:rows].gather(1, slot.clamp(max=self._tokens.shape[1] - 1).expand(rows, -1))
        return Feed(
            ids=torch.where(real, tokens, self.mask_id),
            widths=widths,
            kinds=["round"] * rows,
            fans=(anchor, step),
        )

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        rows, device = len(feed.ids), hidden.device
        fed = self._fed[:rows]
        widest = max(map(len, fed))
        at = torch.arange(rows, device=device)
        count = self._shape[:rows, 0]
        draws = self._numbers(range(rows), 2 * self.settings.max_horizon)
        if self.settings.verify:
            chosen, _ = self._choose(hidden[:, :widest], draws[:, :widest])  # (n, C): what the causal model writes next
            right = (feed.ids[:, 1:widest] == chosen[:, :-1]) & (
                torch.arange(1, widest, device=device) < count[:, None]
            )
            last = right.cumprod(1).sum(1)  # (n,) the last token kept
            pending, written = chosen[at, last], last + 1
        else:
            last, written = count - 1, torch.ones_like(count)  # what is fed was kept when it was drafted
            pending = self._choose(hidden[at, last][:, None], draws[:, :1])[0][:, 0]
        ahead = written[:, None] + torch.arange(self.masks, device=device)
        drafts, sure = self._drafts(hidden, last, draws.gather(1, ahead))  # (n, M) each
        room = torch.tensor(rooms, device=device) - last - 1
        self._tokens[:rows, 0] = pending
        self._tokens[:rows, 1:] = drafts
        length = self._cut(sure, self.head.stride(hidden[at, last]).to(device), room)
        self._open(sure, length)
        state = torch.cat([last[:, None], self._shape[:rows], self._tokens[:rows]], 1)
        return self._report(state.tolist())

    def move(self, source: int, target: int) -> None:
        for state in (self._tokens, self._fan_at, self._shape):
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
        logits = self.backbone.logits(hidden)
        if self.settings.temperature == 0:
            sure, tokens = logits.softmax(-1).max(-1)
            return tokens, sure
        flat = choose(
            logits.flatten(0, 1), draws.flatten(), self.settings.temperature, self.settings.top_p, "probability"
        )
        return flat[0].view(draws.shape), flat[1].view(draws.shape)

    def _drafts(self, hidden: Tensor, last: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """What the fan behind each row's last kept token says, and how surely: 0 where no fan was opened there.

        Drawn with the numbers that will verify them, so that drafts from the right distribution are right.
        hidden: (n, S, D).  last: (n,).  draws: (n, M).
        """
        rows, step = len(hidden), torch.arange(self.masks, device=hidden.device)
        count, fans = self._shape[:rows, :1], self._shape[:rows, 1:]
        hit = (self._fan_at[:rows] == last[:, None]) & (torch.arange(self.fans, device=hidden.device) < fans)  # (n, F)
        slots = count + hit.long().argmax(1, keepdim=True) * self.masks + step  # (n, M)
        slots = slots.clamp(max=hidden.shape[1] - 1)
        states = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        tokens, sure = self._choose(states, draws)
        return tokens, sure * hit.any(1, keepdim=True)

    def _cut(self, sure: Tensor, stride: Tensor, room: Tensor) -> Tensor:
        """Drafts to feed, (n,): within the K-head's stride and the window, and likely or sure enough.

        sure: (n, M).  stride, room: (n,) tokens, the pending one included.
        """
        if self.settings.verify:
            worth = sure.cumprod(1) >= UNLIKELY
        else:
            worth = (sure > self.settings.confidence).cumprod(1).bool()
        stride = stride.clamp(self.settings.min_horizon, self.settings.max_horizon)
        most = torch.minimum(stride, room).clamp(min=1) - 1
        return torch.minimum(worth.sum(1), most)

    def _open(self, sure: Tensor, length: Tensor) -> None:
        """Choose where the next fans hang: behind the tokens after which the drafts likeliest end.

        sure: (n, M) probability of each draft.  length: (n,) drafts fed.
        """
        rows, masks = sure.shape
        if masks == 0:
            return
        draft = torch.arange(masks + 1, device=sure.device)
        sure = torch.cat([sure, torch.zeros_like(sure[:, :1])], 1).masked_fill(draft >= length[:, None], 0.0)
        reached = torch.cat([torch.ones_like(sure[:, :1]), sure[:, :-1].cumprod(1)], 1)
        ends = reached * (1 - sure)  # (n, M + 1): the last draft right is number i
        if not self.settings.verify:
            ends = (draft == length[:, None]).float()
        likely, where = ends.topk(min(self.fans, masks + 1), dim=1)
        self._fan_at[:rows, : where.shape[1]] = where
        self._shape[:rows, 0] = length + 1
        self._shape[:rows, 1] = (likely >= UNLIKELY).sum(1)

    def _report(self, state: list[list[int]]) -> Absorbed:
        """Book on the host what was kept and what comes next."""
        tokens: list[list[int]] = []
        keep: list[int] = []
        predicted: list[int | None] = []
        for row, (last, count, fans, *fresh) in enumerate(state):
            fed, new = self._fed[row], fresh[:count]
            tokens.append(fed[1 : last + 1] + new[:1] if self.settings.verify else new)
            keep.append(last + 1)
            predicted.append(len(fed) if self.settings.verify else count)
            self._draws.take(row, len(tokens[-1]))
            self._fed[row], self._opened[row] = new, fans
        return Absorbed(tokens, keep, predicted)
