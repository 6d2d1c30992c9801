"""What token, and how sure: shared by the decoders.

Legend: n rows or slots, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..forward import compiled
from ..settings import Rule

ENTROPY_FLOOR = 1e-10
"""What is added to a probability whose logarithm is taken.  (NBDiff, public decoder)"""


class Draws:
    """Uniform random numbers of each row, one a place of its text: the token there is drawn by it, whoever does."""

    def __init__(self, slots: int) -> None:
        self._random = [torch.Generator() for _ in range(slots)]
        self._ahead: list[list[float]] = [[] for _ in range(slots)]

    def seed(self, slot: int, seed: int) -> None:
        """Begin a row."""
        self._random[slot], self._ahead[slot] = torch.Generator().manual_seed(seed), []

    def peek(self, slots: range, count: int) -> Tensor:
        """Numbers of the next `count` places, (n, count)."""
        for slot in slots:
            ahead = self._ahead[slot]
            while len(ahead) < count:
                ahead.append(float(torch.rand((), generator=self._random[slot])))
        return torch.tensor([self._ahead[slot][:count] for slot in slots])

    def take(self, slot: int, count: int) -> None:
        """A row has written `count` tokens."""
        del self._ahead[slot][:count]

    def move(self, source: int, target: int) -> None:
        self._random[target], self._ahead[target] = self._random[source], self._ahead[source]


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals: (n, V) -> (n,). On a CPU numpy looks for it, ten times as
    fast as torch.
    """
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def surest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, the surest first, and their probabilities: (n, V) -> (n, count) each."""
    found = compiled.top_k(logits, count)
    if found is not None:
        return found
    sure, tokens = logits.softmax(-1).topk(count)
    return tokens, sure


def nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities in falling order, those outside the nucleus 0, and the ids they belong to: (n, V) each."""
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.masked_fill(before >= top_p, 0.0), order  # the most likely token always stays


def choose(logits: Tensor, draws: Tensor, temperature: float, top_p: float, rule: Rule) -> tuple[Tensor, Tensor]:
    """A token a row and how sure it is, the surer the larger.

    One uniform number a row decides, by the inverse distribution function.  logits: (n, V).  draws: (n,) in [0, 1),
    unused at temperature 0.  Sureness: the token's probability; the gap between the two likeliest; or minus the
    entropy in nats, each after temperature and nucleus.  Returns (n,) ids and (n,) sureness.  (Holtzman et al. 2020,
    nucleus sampling; NBDiff, public decoder)
    """
    scaled = logits / temperature if temperature > 0 else logits
    probabilities, order = nucleus(scaled, top_p)
    if top_p < 1:  # else they are whole: to divide by their rounded sum would part slots that are equally sure
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if temperature > 0:
        rank = (probabilities.cumsum(-1) <= draws[:, None]).sum(-1, keepdim=True)
        rank = torch.minimum(rank, (probabilities > 0).sum(-1, keepdim=True) - 1)  # a sum may round to below the draw
    else:
        rank = torch.zeros_like(order[:, :1])
    token = order.gather(-1, rank)[:, 0]
    if rule == "probability":
        return token, probabilities.gather(-1, rank)[:, 0]
    if rule == "margin":
        return token, probabilities[:, 0] - probabilities[:, 1]
    return token, (probabilities * (probabilities + ENTROPY_FLOOR).log()).sum(-1)
