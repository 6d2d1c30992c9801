"""What the plain samplers share: one row without a cache, a whole forward of transformers' model for every question.

Legend: L tokens of the row, n slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.engine.records import KINDS, Kind, Request

Written = tuple[tuple[int, ...], dict[Kind, int]]
"""Ids of an answer, and its forwards by kind."""


def causal(length: int, both_from: int | None = None) -> Tensor:
    """The order of slots that read causally, but in both directions from `both_from` on: (L,)."""
    return torch.arange(length).clamp(max=length if both_from is None else both_from)


def in_blocks(length: int, first: int, block_length: int) -> Tensor:
    """The order of slots that read their own block and those before it.  first: slot where a block begins.  (L,)"""
    return (torch.arange(length) - first).div(block_length, rounding_mode="floor")


def forward(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    order: Tensor,
    states: DynamicCache | None = None,
    places: Sequence[int] | None = None,
) -> Tensor:
    """Logits of a row in which a slot attends to all that come before it or with it in the order: (L,) -> (L, V).

    states: empty; gets the slots' keys and values.  places: (L,) positions, where they are not those of `ids`.
    """
    bias = torch.zeros(1, 1, len(ids), len(ids))
    bias.masked_fill_(order[:, None] < order, torch.finfo(torch.float32).min)
    positions = None if places is None else torch.tensor([places])
    with torch.inference_mode():
        logits: Tensor = checkpoint.model(
            input_ids=torch.tensor([ids]), attention_mask=bias, past_key_values=states, position_ids=positions
        ).logits[0]
    return logits


def forward_and_states(checkpoint: Checkpoint, ids: Sequence[int], order: Tensor) -> tuple[Tensor, DynamicCache]:
    """`forward`, with keys and values of all its slots."""
    states = DynamicCache()
    return forward(checkpoint, ids, order, states), states


def forward_alone(checkpoint: Checkpoint, ids: Sequence[int], slots: range, states: DynamicCache) -> Tensor:
    """Logits of a few slots that attend to one another, and to all others as an earlier forward left them: (n, V).

    ids: (L,) of all slots.  states: of all slots.
    """
    others = [slot for slot in range(len(ids)) if slot not in slots]
    past = DynamicCache()
    for number, layer in enumerate(states.layers):
        past.update(layer.keys[:, :, others], layer.values[:, :, others], number)
    with torch.inference_mode():
        logits: Tensor = checkpoint.model(
            input_ids=torch.tensor([ids[slots.start : slots.stop]]), position_ids=torch.tensor([list(slots)]),
            attention_mask=torch.zeros(1, 1, len(slots), len(ids)), past_key_values=past,
        ).logits[0]  # fmt: skip
    return logits


def moved(logits: Tensor, shift: bool) -> Tensor:
    """A copy, right by one slot where predictions are shifted, as Dream's public code does after every forward."""
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits.clone()


def cut(checkpoint: Checkpoint, answer: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    """An answer up to its limit and before its first end."""
    answer = answer[:new_tokens]
    end = next((i for i, token in enumerate(answer) if token in checkpoint.end_ids), None)
    return tuple(answer[:end])


def sample(
    logits: Tensor, draws: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[list[int], Tensor]:
    """A token of each slot, by one uniform number each, and the probabilities that it is drawn from.

    logits: (n, V).  draws: (n,), unused at temperature 0.  Returns n ids and (n, V) probabilities after temperature,
    then top-k, then nucleus; at temperature 0 the model's own.
    """
    if not temperature:
        return logits.argmax(-1).tolist(), logits.softmax(-1)
    tokens, probabilities = [], torch.zeros_like(logits)
    for slot, (values, draw) in enumerate(zip(logits / temperature, draws.tolist(), strict=True)):
        chance, order = values.softmax(-1).sort(descending=True, stable=True)
        if top_k:
            chance = chance[:top_k]
            chance = chance / chance.sum()
        chance = chance[: 1 + int((chance.cumsum(0)[:-1] < top_p).sum())]
        chance = chance / chance.sum()
        place = min(int((chance.cumsum(0) <= draw).sum()), len(chance) - 1)
        tokens.append(int(order[place]))
        probabilities[slot, order[: len(chance)]] = chance
    return tokens, probabilities


class PlainRow:
    """A row being written. ids: prompt and answer.  forwards: so far, by kind.  random: its own numbers."""

    def __init__(self, checkpoint: Checkpoint, request: Request) -> None:
        self.checkpoint, self.request = checkpoint, request
        self.mask = -1 if checkpoint.mask_id is None else checkpoint.mask_id
        self.ids = list(request.prompt)
        self.forwards: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.random = torch.Generator().manual_seed(request.seed)

    @property
    def answer(self) -> list[int]:
        """Tokens behind the prompt."""
        return self.ids[len(self.request.prompt) :]

    @property
    def left(self) -> int:
        """Tokens that the answer may still grow by."""
        return self.request.max_new_tokens - len(self.answer)

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether an end is among them."""
        return not set(self.checkpoint.end_ids).isdisjoint(tokens)

    def ask(self, kind: Kind, ids: Sequence[int], order: Tensor) -> Tensor:
        """Logits of one more forward: (L, V)."""
        self.forwards[kind] += 1
        return forward(self.checkpoint, ids, order)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Gumbel noise, float64."""
        uniform = torch.rand(tuple(shape), dtype=torch.float64, generator=self.random)
        return -torch.log(-torch.log(uniform.clamp(min=1e-300)))

    def written(self) -> Written:
        """What came of it."""
        return cut(self.checkpoint, self.answer, self.request.max_new_tokens), self.forwards
