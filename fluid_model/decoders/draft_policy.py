"""Draft policy: how large a draft is worth its forward.  (after EAGLE-2's confidence-driven trees, Li et al. 2024, with
a marginal cost in place of a fixed size)

The more slots a forward has, the longer it takes: as measured on the device (`forward_time`), or, where a slot budget
is set, 1 + slots / budget times as long as an empty one. So a slot has a marginal cost, in tokens that the same time
would have brought, and is fed where its expected gain is higher:

- a draft token gains one token with its path probability;
- slot j of a mask block gains one draft token if the accepted path ends at its anchor (the node's stop probability)
  and j more draft tokens are accepted behind it (the row's acceptance rate, to the power of j).

Example, marginal cost 0.1, acceptance rate 0.5: candidates of probability .6 and .3 at depths 1 and 2 grow paths of .6,
.36, .3, .18, .18; .09 is too unlikely. A node with stop probability .5 gets a mask block of two slots: the gains are
.25 and .125, the third would be .0625.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..forward.forward_time import ForwardTime
from .draft_tree import Candidate, Draft, DraftTree, grow

MIN_COST, MAX_COST = 0.001, 0.9
"""Bounds of the marginal cost of a slot, in tokens."""
MAX_SLOTS = 1024
"""Slots that one row feeds at most in one forward, however large the budget is."""
PRIOR_STEPS = 4
"""Steps that a row's statistics begin with, as if it had made them: of PRIOR_TOKENS committed and PRIOR_SLOTS fed."""
PRIOR_TOKENS, PRIOR_SLOTS = 2.5, 12.0
PRIOR = PRIOR_STEPS * np.array([[1.0], [PRIOR_TOKENS], [PRIOR_SLOTS]])
"""Steps, tokens and slots of the prior, as a column."""


class StepStatistics:
    """Speculative steps of each row so far, its prior included, (B,) each. committed: tokens.  fed: slots.

    Legend: B rows, n of them that are asked for.
    """

    def __init__(self, rows: int) -> None:
        self._all = np.zeros((3, rows))
        self.steps, self.committed, self.fed = self._all
        self.restart(slice(0, rows))

    def restart(self, rows: slice) -> None:
        """Begin with the prior."""
        self._all[:, rows] = PRIOR

    def move(self, source: int, target: int) -> None:
        """Copy one row's over another's."""
        self._all[:, target] = self._all[:, source]

    def acceptance_rates(self, rows: slice) -> np.ndarray:
        """(n,) chances that one more draft token is accepted: 1 - steps / committed tokens, the estimate from the mean
        accepted length under a geometric law (alpha of Leviathan et al. 2023). Not accepted over drafted tokens.
        """
        return 1 - self.steps[rows] / self.committed[rows]

    def marginal_costs(self, rows: slice, slot_budget: float, together: int) -> np.ndarray:
        """(n,) costs of one more slot, in tokens, where `together` rows like this one share a forward.

        With g tokens committed and S slots fed per row and step, n rows commit n g tokens in the time 1 + n S / budget.
        A slot takes 1 / budget of time: (1 / budget) n g / (1 + n S / budget) = n g / (budget + n S) tokens.
        """
        committed, fed = self.committed[rows] / self.steps[rows], self.fed[rows] / self.steps[rows]
        costs: np.ndarray = together * committed / (slot_budget + together * fed)
        return costs.clip(MIN_COST, MAX_COST)

    def timed_cost(
        self, rows: slice, forward_time: ForwardTime, together: int, context: float, rate: float | None
    ) -> float:
        """The same of `together` rows that are on average like these, where the time of a forward is known: tokens that
        would come in the time that a slot adds. One number, since all share the forward.

        context: cached tokens of a row, on average.
        rate: tokens a second of each row, as measured; None: those of a forward, without the time between forwards.
        """
        steps = self.steps[rows]
        slots = together * float((self.fed[rows] / steps).mean())
        if rate is None:
            rate = float((self.committed[rows] / steps).mean()) / forward_time.seconds(slots, context)
        return min(max(together * rate * forward_time.marginal(slots, context), MIN_COST), MAX_COST)


def mask_blocks(
    stop_probabilities: Sequence[float], acceptance_rate: float, cost: float, max_masks: int, max_slots: int
) -> list[int]:
    """Size of the mask block of each node: as many slots as have an expected gain of at least `cost`.

    max_masks: of one mask block.  max_slots: of all of them together; the first nodes take theirs first.
    """
    sizes = []
    shrink = math.log(acceptance_rate) if acceptance_rate > 0 else -math.inf
    for stop_probability in stop_probabilities:
        size = 0
        if stop_probability > cost:
            # The largest j with stop_probability * acceptance_rate ** j >= cost.
            size = min(int(math.log(cost / stop_probability) / shrink), max_slots, max_masks)
        max_slots -= size
        sizes.append(size)
    return sizes


def costed_draft(
    bonus: int,
    candidates: Sequence[Sequence[Candidate]],
    acceptance_rate: float,
    cost: float,
    max_masks: int,
    max_slots: int,
) -> Draft:
    """A draft whose slots all gain more than they cost. Half of the slots at most are draft tokens.

    bonus: the root of the tree.  candidates: for each depth, the likeliest first.
    """
    tree = grow(bonus, candidates, cost, max_slots // 2)
    slots_left = max_slots - len(tree.tokens)
    masks = mask_blocks(tree.stop_probabilities, acceptance_rate, cost, max_masks, slots_left)
    return Draft(tree, masks)


def confident_draft(
    bonus: int, candidates: Sequence[Sequence[Candidate]], confidence: float, max_masks: int
) -> tuple[Draft, list[int]]:
    """A draft that is committed without verification, so that confidence decides and not cost: a chain up to the first
    token whose probability does not exceed `confidence`, and a full mask block behind it.  (FLUID, one parallel pass)

    Returns the draft, and the tokens that the threshold dropped.
    """
    likeliest = [ranked[0] for ranked in candidates]
    confident = 0
    while confident < len(likeliest) and likeliest[confident][1] > confidence:
        confident += 1
    tokens = [token for token, _ in likeliest]
    masks = [0] * confident + [max_masks]
    return Draft(DraftTree.chain([bonus, *tokens[:confident]]), masks), tokens[confident:]
