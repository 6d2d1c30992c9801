"""Sampling: from logits to a token and its confidence, shared by the decoders.

Legend: n rows or slots, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..forward import compiled
from ..settings import Rule

LOG_OFFSET = 1e-10
"""Added to a probability before its logarithm.  (NBDiff and Dream, public decoders)"""


class Draws:
    """Uniform random numbers of each row, one for each place of its answer.

    A place's token follows from its number, whether AR samples it, a mask block drafts it or verification checks it.
    With these common random numbers a draft agrees with AR as often as it can.
    """

    def __init__(self, rows: int) -> None:
        self._generators = [torch.Generator() for _ in range(rows)]
        self._ahead: list[list[float]] = [[] for _ in range(rows)]  # drawn for places that are not committed yet

    def seed(self, row: int, seed: int) -> None:
        """Start a row's numbers."""
        self._generators[row], self._ahead[row] = torch.Generator().manual_seed(seed), []

    def peek(self, rows: range, count: int) -> Tensor:
        """Numbers of the next `count` places of each row, (n, count)."""
        numbers = []
        for row in rows:
            ahead = self._ahead[row]
            while len(ahead) < count:  # one by one, so that the numbers do not depend on how far rows look ahead
                ahead.append(float(torch.rand((), generator=self._generators[row])))
            numbers.append(ahead[:count])
        return torch.tensor(numbers)

    def advance(self, row: int, count: int) -> None:
        """A row has committed `count` tokens."""
        del self._ahead[row][:count]

    def move(self, source: int, target: int) -> None:
        self._generators[target], self._ahead[target] = self._generators[source], self._ahead[source]


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals: (n, V) -> (n,). On a CPU by numpy, which takes a tenth of
    torch's time.
    """
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def top_k(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row in descending order, and their probabilities: (n, V) -> (n, count) each."""
    ranked = compiled.top_k(logits, count)
    if ranked is not None:
        return ranked
    probabilities, tokens = logits.softmax(-1).topk(count)
    return tokens, probabilities


def nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, those outside the nucleus 0, and their token ids: (n, V) each.  (Holtzman et
    al. 2020)
    """
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0.0), order  # the likeliest token always stays


def restrict(logits: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Logits of the likeliest tokens, minus infinity elsewhere: (M, V).  (Dream, public decoder)

    top_p: the smallest set whose probability exceeds it.  top_k: as many of those; None for all.
    """
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        before = functional.pad(ranked.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        logits = logits.masked_fill((before > top_p).gather(-1, order.argsort(-1)), -torch.inf)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def choose(logits: Tensor, draws: Tensor, temperature: float, top_p: float, rule: Rule) -> tuple[Tensor, Tensor]:
    """A token and a confidence for each row, by temperature and nucleus sampling: (n, V) -> (n,) ids, (n,) confidences.

    draws: (n,) uniform numbers in [0, 1), unused at temperature 0.  rule: what the confidence is, after temperature and
    nucleus: the token's probability; the margin between the two likeliest tokens; minus the entropy, in nats.
    (NBDiff, public decoder)
    """
    # 1) the distribution, in descending order
    scaled = logits / temperature if temperature > 0 else logits
    probabilities, order = nucleus(scaled, top_p)  # (n, V) each
    if top_p < 1:  # a full nucleus sums to 1 but for rounding, and dividing by that would break ties
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)

    # 2) the token, by the inverse distribution function at the row's random number
    if temperature > 0:
        rank = (probabilities.cumsum(-1) <= draws[:, None]).sum(-1, keepdim=True)  # (n, 1)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1
        rank = torch.minimum(rank, last)  # the cumulative sum may round to less than the draw
    else:
        rank = torch.zeros_like(order[:, :1])
    token = order.gather(-1, rank)[:, 0]

    # 3) the confidence
    if rule == "probability":
        return token, probabilities.gather(-1, rank)[:, 0]
    if rule == "margin":
        return token, probabilities[:, 0] - probabilities[:, 1]
    return token, (probabilities * (probabilities + LOG_OFFSET).log()).sum(-1)
