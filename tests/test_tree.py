"""Draft trees: growth, preorder, verification, compaction of the cache, transfer to the host."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluid_model.decoders.draft_tree import DraftTree, grow
from fluid_model.decoders.fluid import _to_host
from fluid_model.decoders.sampling import argmax
from fluid_model.decoders.verification import verify_path
from fluid_model.engine.strategy import RowUpdate, Updates
from fluid_model.forward import attention_masks
from fluid_model.forward.kv_cache import KVCache

ROOT = 7
CHANCES = st.lists(
    st.lists(st.floats(0.01, 0.6), min_size=1, max_size=3, unique=True).map(
        lambda values: sorted(values, reverse=True)
    ),
    max_size=4,
)


def drafts_of(chances: list[list[float]]) -> list[list[tuple[int, float]]]:
    return [
        [(10 * depth + rank, probability) for rank, probability in enumerate(ranked)]
        for depth, ranked in enumerate(chances)
    ]


def text_of(tree: DraftTree, node: int) -> tuple[int, ...]:
    return () if node < 0 else (*text_of(tree, tree.parents[node]), tree.tokens[node])


@given(CHANCES, st.floats(0.001, 0.5), st.integers(1, 30))
def test_the_likeliest_paths_are_grown(chances, least, most):
    """Against the product of all candidates."""
    drafts, every = drafts_of(chances), {(ROOT,): 1.0}
    for length in range(1, len(drafts) + 1):
        for chosen in product(*drafts[:length]):
            reached = 1.0
            for _, probability in chosen:
                reached *= probability
            every[ROOT, *(token for token, _ in chosen)] = reached
    tree = grow(ROOT, drafts, least, most)
    grown = {text_of(tree, node): tree.path_probabilities[node] for node in range(len(tree.tokens))}
    wanted = {text: reached for text, reached in every.items() if reached >= least}
    assert len(grown) == len(tree.tokens) == min(most, len(wanted))
    assert all(every[text] == reached for text, reached in grown.items())
    left_out = [reached for text, reached in wanted.items() if text not in grown]
    assert max(left_out, default=0.0) <= min(grown.values())


@given(CHANCES, st.integers(1, 30))
def test_a_subtree_is_a_range_of_nodes(chances, most):
    tree = grow(ROOT, drafts_of(chances), 0.001, most)
    texts = [text_of(tree, node) for node in range(len(tree.tokens))]
    assert tree.depths == [len(text) - 1 for text in texts]
    for node, (text, end) in enumerate(zip(texts, tree.subtree_ends, strict=True)):
        subtree = [other for other, longer in enumerate(texts) if longer[: len(text)] == text]
        assert subtree == list(range(node, end))
        onward = [tree.path_probabilities[other] for other in subtree if len(texts[other]) == len(text) + 1]
        assert onward == sorted(onward, reverse=True), "the likelier child first"
        assert tree.stop_probabilities[node] == pytest.approx(tree.path_probabilities[node] - sum(onward))
    assert [texts[node] for node in tree.greedy_path] == [
        texts[tree.greedy_path[-1]][: n + 1] for n in tree.greedy_path
    ]
    assert tree.subtree_ends[tree.greedy_path[-1]] == tree.greedy_path[-1] + 1, "a leaf"


@given(CHANCES, st.integers(1, 30), st.integers())
def test_the_accepted_path_is_the_longest_that_the_model_predicts(chances, most, seed):
    drafts, chance = drafts_of(chances), random.Random(seed)
    tree = grow(ROOT, drafts, 0.001, most)
    target = (ROOT, *(chance.choice(ranked)[0] for ranked in drafts), 99)
    predictions = [target[depth + 1] if depth + 1 < len(target) else 99 for depth in tree.depths]
    path = verify_path(tree, predictions)
    texts = [text_of(tree, node) for node in range(len(tree.tokens))]
    longest = max((text for text in texts if target[: len(text)] == text), key=len)
    assert texts[path[-1]] == longest
    assert path == [texts.index(longest[: n + 1]) for n in range(len(longest))]


def test_a_chain_is_a_tree():
    tree = DraftTree.chain([5, 6, 7])
    assert (tree.depths, tree.subtree_ends, tree.greedy_path) == ([0, 1, 2], [3, 3, 3], [0, 1, 2])
    assert verify_path(tree, [6, 9, 9]) == [0, 1]


def test_a_slot_attends_to_its_own_path():
    """Two sibling candidates, a mask block at each:

    0 1 2      two masks anchored at 2
      3        one mask anchored at 3
    """
    order = [
        at * attention_masks.MAX_STEPS + step
        for at, step in ((0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (2, 2), (3, 1), (0, 0))
    ]
    until = [at * attention_masks.MAX_STEPS for at in (4, 4, 3, 4, 3, 3, 4, 0)]
    fed = attention_masks.AttentionIntervals(
        *(torch.tensor([each]) for each in (order, until, [0, 1, 2, 2, 3, 4, 3, 0]))
    )
    cached = 2
    columns = torch.arange(cached, cached + len(order))[None]
    plan = attention_masks.AttentionPlan(columns, cached + len(order), intervals=fed)
    assert plan.positions.tolist() == [[2, 3, 4, 4, 5, 6, 5, 2]]
    keys = [set(row.nonzero()[:, 0].tolist()) - {0, 1} for row in plan.mask()[0]]
    assert all(plan.mask()[0, :, :cached].all(1)), "all attend to cached tokens"
    assert [{key - cached for key in row} for row in keys[:-1]] == [
        {0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 2, 4}, {0, 1, 2, 4, 5}, {0, 1, 3, 6},
    ]  # fmt: skip


@pytest.mark.parametrize("in_one", [False, True])
def test_accepted_slots_move_behind_the_cached_tokens(in_one):
    """Rows of different length; the first keeps its first slots, the others skip some. Also in one buffer."""
    lengths, fed = [3, 1, 5], 6
    cache = KVCache(4, 20)
    if in_one:
        cache.storage(layers=2, heads=1, size=4)
    before = []
    for layer in range(2):
        cache.set_write_positions(0, [0, 0, 0], 6, torch.device("cpu"))
        cache.put(torch.randn(3, 2, 6, 4), layer)
        cache.set_write_positions(0, lengths, fed, torch.device("cpu"))
        cache.put(torch.randn(3, 2, fed, 4), layer)
        before.append(cache._layers[layer].clone())
    paths = [[0, 1], [0, 2], [0, 1, 3, 5]]
    updates = Updates.of([RowUpdate([], [], path) for path in paths])
    assert updates.moves == [(1, 2, 1), (2, 3, 2), (2, 5, 3)]
    cache.compact(lengths, updates.moves)
    for old, new in zip(before, cache._layers.values(), strict=True):
        for row, (length, slots) in enumerate(zip(lengths, paths, strict=True)):
            wanted = old[:, row][:, :, [*range(length), *(length + slot for slot in slots)]]
            assert torch.equal(new[:, row, :, : length + len(slots)], wanted)
        assert torch.equal(new[:, 3], old[:, 3])


def test_tables_reach_the_host_bit_for_bit():
    """In one transfer: integers, floats, empty tables."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2**31, (5, 2), generator=generator)
    numbers = torch.rand(3, 4, generator=generator) * torch.tensor([1.0, 1e-30, 1e-42, 0.0])
    for tables in (
        (tokens, tokens[:3], numbers),
        (tokens, tokens[:0], numbers[:0]),
        (tokens, tokens[:3, :1], numbers[:, 1, None]),
    ):
        here = _to_host(tables)
        assert all(
            mine.dtype == table.dtype and torch.equal(mine, table) for mine, table in zip(here, tables, strict=True)
        )


def test_the_first_of_equals_is_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.0, 3.0], [-torch.inf, -5.0, -torch.inf], [1.0, torch.nan, 2.0]])
    assert argmax(logits).tolist() == [1, 0, 1, 1]
    many = torch.randn(7, 900, generator=torch.Generator().manual_seed(0))
    assert argmax(many).equal(many.argmax(-1))
