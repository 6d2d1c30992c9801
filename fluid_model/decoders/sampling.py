"""Sampling: from logits to a token and its confidence, shared by the decoders.

Legend: n rows or slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..forward import compiled
from ..settings import Rule

LOG_OFFSET = 1e-10
"""Added to a probability before its logarithm.  (NBDiff and Dream, public decoders)"""
DRAWN = 128
"""Random numbers that are drawn at once."""
LIKELIEST = 64
"""Tokens that are ranked first where one is chosen; all the others only if they could matter."""


class Draws:
    """Uniform random numbers of each row, one for each place of its answer.

    A place's token follows from its number, whether AR samples it, a mask block drafts it or verification checks it.
    With these common random numbers a draft agrees with AR as often as it can.
    """

    def __init__(self, rows: int, ahead: int = 1) -> None:
        """ahead: places that are looked at before they are committed, at most."""
        self._generators = [torch.Generator() for _ in range(rows)]
        self._numbers = np.zeros((rows, ahead + DRAWN), np.float32)  # the next place's is at `_first`
        self._first = np.zeros(rows, np.int64)

    def seed(self, row: int, seed: int) -> None:
        """Start a row's numbers."""
        self._generators[row] = torch.Generator().manual_seed(seed)
        self._first[row] = self._numbers.shape[1]  # none is left

    def peek(self, rows: slice, count: int) -> Tensor:
        """Numbers of the next `count` places of each row, (n, count)."""
        for row in (self._first[rows] > self._numbers.shape[1] - count).nonzero()[0] + rows.start:
            self._draw(row)
        places = self._first[rows, None] + np.arange(count)
        return torch.from_numpy(np.take_along_axis(self._numbers[rows], places, 1))

    def advance(self, rows: slice, counts: Sequence[int] | np.ndarray | int) -> None:
        """Rows have committed so many tokens."""
        self._first[rows] += counts

    def move(self, source: int, target: int) -> None:
        self._generators[target] = self._generators[source]
        self._numbers[target], self._first[target] = self._numbers[source], self._first[source]

    def _draw(self, row: int) -> None:
        """Drop a row's numbers before its next place, and fill up. They are the same however many are drawn at once."""
        left = self._numbers[row, self._first[row] :].copy()
        self._numbers[row, : len(left)] = left
        fresh = self._numbers.shape[1] - len(left)
        self._numbers[row, len(left) :] = torch.rand(fresh, generator=self._generators[row]).numpy()
        self._first[row] = 0


def rank(logits: Tensor, single: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest token of the first `single` rows, (single,); of the others the `count` likeliest in falling order
    and their probabilities, (M - single, count) each.  logits: (M, V).
    """
    ranked = compiled.rank(logits, single, count)
    if ranked is not None:
        return ranked
    probabilities, tokens = logits[single:].softmax(-1).topk(count)
    return logits[:single].argmax(-1), tokens, probabilities


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals: (n, V) -> (n,). On a CPU by numpy, which takes a tenth of
    torch's time.
    """
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, those outside the nucleus 0, and their token ids: (n, V) each.  (Holtzman et
    al. 2020)
    """
    values, order = _ranked(logits.softmax(-1))
    return _cut(values, top_p), order


def _ranked(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, and their tokens, the first of equals first: (n, V) each."""
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    return values, order


def _cut(values: Tensor, top_p: float) -> Tensor:
    """Probabilities in descending order, those outside the nucleus 0. The likeliest token always stays."""
    return values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)


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
    """A token and a confidence for each row, by temperature and nucleus sampling (Holtzman et al. 2020): (n, V) -> (n,)
    ids, (n,) confidences.

    draws: (n,) uniform numbers in [0, 1), unused at temperature 0.  rule: what the confidence is, after temperature and
    nucleus: the token's probability; the margin between the two likeliest tokens; minus the entropy, in nats.
    (NBDiff, public decoder)
    """
    probabilities = (logits / temperature if temperature > 0 else logits).softmax(-1)
    if rule == "entropy" or logits.shape[-1] <= LIKELIEST:
        return _choose(_ranked(probabilities), draws, temperature, top_p, rule)[:2]
    # To rank all tokens may take as long as the model's forward, and hardly ever matters.
    tokens, confidences, is_certain = _choose(probabilities.topk(LIKELIEST), draws, temperature, top_p, rule)
    if not is_certain.all():
        rest = (~is_certain).nonzero()[:, 0]
        tokens[rest], confidences[rest], _ = _choose(
            _ranked(probabilities[rest]), draws[rest], temperature, top_p, rule
        )
    return tokens, confidences


def _choose(
    ranked: tuple[Tensor, Tensor], draws: Tensor, temperature: float, top_p: float, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose` from the likeliest tokens: their probabilities in descending order and the tokens, (n, L) each.

    Returns the tokens, their confidences, and whether others could change neither: (n,) each. They could if the nucleus
    or the random number reaches beyond the likeliest, or if equals compete.
    """
    values, order = ranked
    # 1) the nucleus, which the likeliest token is always in
    probabilities, is_certain = values, torch.ones_like(draws, dtype=torch.bool)
    if top_p < 1:  # a full nucleus sums to 1 but for rounding, and dividing by that would break ties
        probabilities = _cut(values, top_p)
        is_certain = probabilities[:, -1] == 0
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)

    # 2) the token, by the inverse distribution function at the row's random number
    rank = torch.zeros_like(order[:, :1])  # (n, 1)
    if temperature > 0:
        reached = probabilities.cumsum(-1)
        is_certain = is_certain & (reached[:, -2:-1] > draws[:, None]).all(-1)
        rank = (reached <= draws[:, None]).sum(-1, keepdim=True)
        last = (probabilities > 0).sum(-1, keepdim=True) - 1
        rank = torch.minimum(rank, last)  # the cumulative sum may round to less than the draw
    token = order.gather(-1, rank)[:, 0]
    chosen, places = values.gather(-1, rank), torch.arange(values.shape[-1], device=values.device)
    is_certain = is_certain & ((values != chosen) | (places == rank)).all(-1)

    # 3) the confidence
    if rule == "probability":
        return token, probabilities.gather(-1, rank)[:, 0], is_certain
    if rule == "margin":
        return token, probabilities[:, 0] - probabilities[:, 1], is_certain
    return token, (probabilities * (probabilities + LOG_OFFSET).log()).sum(-1), is_certain
