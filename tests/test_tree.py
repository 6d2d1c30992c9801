"""The draft tree: its growth, its mask blocks' anchors, and the accepted path."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluid_model.decoders.draft_tree import Tree, grow
from fluid_model.decoders.fluid import _to_host
from fluid_model.decoders.sampling import likeliest
from fluid_model.forward import attention_masks
from fluid_model.forward.kv_cache import KVCache

ROOT = 7
CHANCES = st.lists(
    st.lists(st.floats(0.01, 0.6), min_size=1, max_size=3, unique=True).map(lambda some: sorted(some, reverse=True)),
    max_size=4,
)


def drafts_of(chances: list[list[float]]) -> list[list[tuple[int, float]]]:
    return [
        [(10 * place + rank, probability) for rank, probability in enumerate(some)]
        for place, some in enumerate(chances)
    ]


def text_of(tree: Tree, node: int) -> tuple[int, ...]:
    return () if node < 0 else (*text_of(tree, tree.parents[node]), tree.tokens[node])


@given(CHANCES, st.floats(0.001, 0.5), st.integers(1, 30))
def test_the_likeliest_texts_are_grown(chances, least, most):
    """Beside every text there is, enumerated."""
    drafts, every = drafts_of(chances), {(ROOT,): 1.0}
    for length in range(1, len(drafts) + 1):
        for some in product(*drafts[:length]):
            reached = 1.0
            for _, probability in some:
                reached *= probability
            every[ROOT, *(token for token, _ in some)] = reached
    tree = grow(ROOT, drafts, least, most)
    reached_by_text = {text_of(tree, node): tree.reached[node] for node in range(len(tree.tokens))}
    wanted = {text: reached for text, reached in every.items() if reached >= least}
    assert len(reached_by_text) == len(tree.tokens) == min(most, len(wanted))
    assert all(every[text] == reached for text, reached in reached_by_text.items())
    left_out = [reached for text, reached in wanted.items() if text not in reached_by_text]
    assert max(left_out, default=0.0) <= min(reached_by_text.values())


@given(CHANCES, st.integers(1, 30))
def test_all_that_hangs_on_a_node_follows_it_at_once(chances, most):
    tree = grow(ROOT, drafts_of(chances), 0.001, most)
    texts = [text_of(tree, node) for node in range(len(tree.tokens))]
    assert tree.depths == [len(text) - 1 for text in texts]
    for node, (text, end) in enumerate(zip(texts, tree.ends, strict=True)):
        hung = [other for other, longer in enumerate(texts) if longer[: len(text)] == text]
        assert hung == list(range(node, end))
        onward = [tree.reached[other] for other in hung if len(texts[other]) == len(text) + 1]
        assert onward == sorted(onward, reverse=True), "the likelier child first"
        assert tree.last[node] == pytest.approx(tree.reached[node] - sum(onward))
    assert [texts[node] for node in tree.likeliest] == [texts[tree.likeliest[-1]][: n + 1] for n in tree.likeliest]
    assert tree.ends[tree.likeliest[-1]] == tree.likeliest[-1] + 1, "a leaf"


@given(CHANCES, st.integers(1, 30), st.integers())
def test_what_comes_true_is_the_longest_text_that_is_said(chances, most, seed):
    drafts, chance = drafts_of(chances), random.Random(seed)
    tree = grow(ROOT, drafts, 0.001, most)
    truth = (ROOT, *(chance.choice(some)[0] for some in drafts), 99)
    predictions = [truth[depth + 1] if depth + 1 < len(truth) else 99 for depth in tree.depths]
    path = tree.walk(predictions)
    texts = [text_of(tree, node) for node in range(len(tree.tokens))]
    longest = max((text for text in texts if truth[: len(text)] == text), key=len)
    assert texts[path[-1]] == longest
    assert path == [texts.index(longest[: n + 1]) for n in range(len(longest))]


def test_a_chain_is_a_tree():
    tree = Tree.chain([5, 6, 7])
    assert (tree.depths, tree.ends, tree.likeliest) == ([0, 1, 2], [3, 3, 3], [0, 1, 2])
    assert tree.walk([6, 9, 9]) == [0, 1]


def test_a_slot_reads_its_own_text():
    """Two texts that part, a fan behind each end: ids as below, read row by row.

    0 1 2      a fan of two masks behind 2
      3        a fan of one mask behind 3
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
    attention = attention_masks.AttentionPlan(columns, cached + len(order), intervals=fed)
    assert attention.positions.tolist() == [[2, 3, 4, 4, 5, 6, 5, 2]]
    reads = [set(row.nonzero()[:, 0].tolist()) - {0, 1} for row in attention.mask()[0]]
    assert all(attention.mask()[0, :, :cached].all(1)), "all read what is cached"
    assert [{key - cached for key in row} for row in reads[:-1]] == [
        {0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 2, 4}, {0, 1, 2, 4, 5}, {0, 1, 3, 6},
    ]  # fmt: skip


def test_what_is_kept_moves_to_the_front():
    """Rows of different length; one keeps its first slots, one parts early, one late."""
    lengths, fed = [3, 1, 5], 6
    cache = KVCache(4, 20)
    before = []
    for layer in range(2):
        cache.set_write_positions(0, [0, 0, 0], 6, torch.device("cpu"))
        cache.put(torch.randn(3, 2, 6, 4), layer)
        cache.set_write_positions(0, lengths, fed, torch.device("cpu"))
        cache.put(torch.randn(3, 2, fed, 4), layer)
        before.append(cache._slabs[layer].clone())
    kept = [[0, 1], [0, 2], [0, 1, 3, 5]]
    cache.compact(lengths, kept)
    for old, new in zip(before, cache._slabs.values(), strict=True):
        for row, (length, slots) in enumerate(zip(lengths, kept, strict=True)):
            wanted = old[:, row][:, :, [*range(length), *(length + slot for slot in slots)]]
            assert torch.equal(new[:, row, :, : length + len(slots)], wanted)
        assert torch.equal(new[:, 3], old[:, 3])


@pytest.mark.parametrize("packed", [False, True])
def test_what_slots_say_comes_to_the_host_as_it_is(packed):
    """In one transfer or in three: tables of integers and of numbers, empty ones too."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2**31, (5, 2), generator=generator)
    probabilities = torch.rand(3, 4, generator=generator) * torch.tensor([1.0, 1e-30, 1e-42, 0.0])
    for tables in (
        (tokens, tokens[:3], probabilities),
        (tokens, tokens[:0], probabilities[:0]),
        (tokens, tokens[:3, :1], probabilities[:, 1, None]),
    ):
        assert _to_host(tables, packed=packed) == [table.tolist() for table in tables]


def test_the_first_of_equals_is_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.0, 3.0], [-torch.inf, -5.0, -torch.inf], [1.0, torch.nan, 2.0]])
    assert likeliest(logits).tolist() == [1, 0, 1, 1]
    many = torch.randn(7, 900, generator=torch.Generator().manual_seed(0))
    assert likeliest(many).equal(many.argmax(-1))
