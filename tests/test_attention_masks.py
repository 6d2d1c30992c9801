"""One mask rule: interval masks of inference and training against naive O(n^2) rules, and against one another.

The naive rules follow parents, anchors and segments slot by slot, and know nothing of intervals.
Legend: B rows, S slots fed, T columns, L slots of a training row.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fluid_model.decoders.draft_tree import Draft, DraftTree
from fluid_model.forward import attention_masks as masks
from fluid_model.forward.kv_cache import slot_columns
from fluid_model.train.masked_layouts import BlockCausalLayout, CanvasLayout
from fluid_model.train.row_layouts import (
    AllMaskLayout,
    CausalLayout,
    Example,
    NoisedBlockLayout,
    TrainingRow,
    pack_rows,
)
from fluid_model.train.stages import attention_mask, collate

MASK = 99


# Inference: draft trees with mask blocks, padded, behind cached tokens


@st.composite
def drafts(draw) -> Draft:
    """A random tree in preorder, and random mask blocks."""
    tree = DraftTree()
    tree.add(0, -1, 1.0, 0)
    for node in range(1, draw(st.integers(1, 9))):
        path = [node - 1]
        while path[-1] > 0:
            path.append(tree.parents[path[-1]])
        parent = draw(st.sampled_from(path))  # preorder: a child of the latest node or of one of its ancestors
        tree.add(node, parent, 1.0, tree.depths[parent] + 1)
    return Draft(tree, [draw(st.integers(0, 3)) for _ in tree.tokens])


Slot = tuple[int, int]
"""Node and step: 0 for the node itself, 1.. for the mask block anchored at it."""


def fed_slots(draft: Draft) -> list[Slot]:
    """Slots in feeding order."""
    nodes = [(node, 0) for node in range(len(draft.masks))]
    return nodes + [(node, step) for node, count in enumerate(draft.masks) for step in range(1, count + 1)]


def path_to(node: int, parents: list[int]) -> list[int]:
    """The node and its ancestors."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


def attends_naively(query: Slot, key: Slot, parents: list[int]) -> bool:
    """A slot attends to its node's path, and within its own mask block to the steps up to its own."""
    (node, step), (other, other_step) = query, key
    if other_step == 0:
        return other in path_to(node, parents)
    return other == node and other_step <= step


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(drafts(), st.integers(0, 5)), min_size=1, max_size=3))
def test_draft_trees_by_walking_parents(rows: list[tuple[Draft, int]]):
    lengths = [length for _, length in rows]
    width = max(draft.slots for draft, _ in rows)
    ids, *layout = torch.tensor([draft.layout(MASK, width) for draft, _ in rows]).unbind(1)  # (B, S) each
    total = max(lengths) + width
    plan = masks.AttentionPlan(
        slot_columns(lengths, width), total, [draft.slots for draft, _ in rows], masks.AttentionIntervals(*layout)
    )
    mask, positions = plan.mask(), plan.positions
    assert mask.shape == (len(rows), width, total)
    for row, (draft, length) in enumerate(rows):
        slots = fed_slots(draft)
        assert ids[row].tolist() == draft.tree.tokens + [MASK] * (width - len(draft.masks))
        for index, (node, step) in enumerate(slots):
            expected = [column < length for column in range(total)]
            for other, key in enumerate(slots):
                expected[length + other] = attends_naively((node, step), key, draft.tree.parents)
            assert mask[row, index].tolist() == expected
            assert positions[row, index] == length + len(path_to(node, draft.tree.parents)) - 1 + step
            assert plan.intervals is not None
            assert plan.intervals.steps[row, index] == step


@settings(max_examples=60, deadline=None)
@given(widths=st.lists(st.integers(0, 6), min_size=1, max_size=4), lengths=st.lists(st.integers(0, 4), min_size=4))
def test_a_bidirectional_prefix(widths: list[int], lengths: list[int]):
    """Slots inside the width attend to one another; all others are causal; all attend to cached tokens."""
    slots, lengths = 6, lengths[: len(widths)]
    plan = masks.AttentionPlan(
        slot_columns(lengths, slots), max(lengths) + slots, None, masks.bidirectional(torch.tensor(widths), slots)
    )
    mask = plan.mask()
    for row, (width, length) in enumerate(zip(widths, lengths, strict=True)):
        for query in range(slots):
            for column in range(mask.shape[2]):
                key = column - length
                both_inside = query < width and 0 <= key < width
                assert mask[row, query, column] == (key <= query or both_inside)
    assert plan.positions.equal(plan.columns)


@settings(max_examples=40, deadline=None)
@given(prompts=st.lists(st.integers(1, 6), min_size=1, max_size=4), block=st.integers(0, 4), length=st.integers(0, 3))
def test_prompts_with_a_mask_block_are_causal(prompts: list[int], block: int, length: int):
    """Tokens and one mask block behind the last form a chain, whatever pads shorter rows."""
    slots = max(prompts) + block
    columns = slot_columns([length] * len(prompts), slots)
    intervals = masks.prompt_with_mask_block(torch.tensor(prompts) - 1, slots)
    plan = masks.AttentionPlan(columns, length + slots, None, intervals)
    for row, tokens in enumerate(prompts):
        count = tokens + block  # padding behind may attend to anything
        assert plan.mask()[row, :count].equal(masks.causal(columns, length + slots)[row, :count])
        assert plan.positions[row, :count].equal(columns[row, :count])
        assert intervals.steps[row, :count].tolist() == [0] * tokens + list(range(1, block + 1))


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3), window=st.integers(1, 6))
def test_chains_and_windows(lengths: list[int], window: int):
    slots = 4
    columns, total = slot_columns(lengths, slots), max(lengths) + slots
    for row, length in enumerate(lengths):
        for query in range(slots):
            own = length + query
            assert masks.AttentionPlan(columns, total).mask()[row, query].tolist() == [
                column <= own for column in range(total)
            ]
            assert masks.sliding(columns, total, window)[row, query].tolist() == [
                own - window < column <= own for column in range(total)
            ]


# Training: packed rows of anchored blocks


@st.composite
def layouts(draw) -> TrainingRow:
    """One example: tokens in a chain, or a canvas in which all attend to all; then blocks, causal inside (FLUID) or
    bidirectional (NBDiff), at any anchors, the slot before the first token among them.
    """
    row, tokens = TrainingRow(), draw(st.integers(1, 5))
    is_canvas = draw(st.booleans())
    for token in range(tokens):
        row.add_slot(token, position=token, label=-100, anchor=tokens - 1 if is_canvas else token, step=0)
    for anchor in draw(st.sets(st.integers(-1, tokens - 1), max_size=3)) if not is_canvas else ():
        is_causal = draw(st.booleans())
        for step in range(1, draw(st.integers(1, 3)) + 1):
            row.add_slot(MASK, position=anchor + step, label=-100, anchor=anchor, step=step if is_causal else 1)
    return row


def chain(tokens: int, *blocks: int) -> TrainingRow:
    """A chain of tokens, with a block of two slots at each of these anchors."""
    row = TrainingRow()
    for token in range(tokens):
        row.add_slot(token, position=token, label=-100, anchor=token, step=0)
    for anchor in blocks:
        row.add_slot(MASK, position=anchor + 1, label=-100, anchor=anchor, step=1)
        row.add_slot(MASK, position=anchor + 2, label=-100, anchor=anchor, step=1)
    return row


def trains_naively(row: TrainingRow, query: int, key: int) -> bool:
    """Within one example a slot attends to all tokens up to its anchor, and to its block's steps up to its own."""
    if query == key:
        return True
    if row.segment[query] != row.segment[key] or row.segment[query] < 0:
        return False
    if row.step[key] == 0:
        return row.anchor[key] <= row.anchor[query]
    return row.anchor[key] == row.anchor[query] and row.step[key] <= row.step[query]


def batch_of(rows: list[TrainingRow]) -> dict[str, Tensor]:
    """(B, L) each; collated rows of plain causal examples have no layout, so one canvas is put beside them."""
    canvas = TrainingRow()
    for token in range(2):
        canvas.add_slot(token, position=token, label=-100, anchor=1, step=0)
    batch = collate([*rows, canvas])
    return {name: batch[name][:-1] for name in ("segment", "anchor", "step")}


PACKS = st.lists(st.lists(layouts(), min_size=1, max_size=3).map(pack_rows), min_size=1, max_size=3)
BEHIND_A_TOKEN = pack_rows([chain(3), chain(2, -1)])
"""The block before the second example's first token is anchored at a slot that is the first example's last token."""
BEHIND_A_BLOCK = pack_rows([chain(2, 1), chain(2, -1, 0), chain(1)])


@settings(max_examples=150, deadline=None)
@given(rows=PACKS)
@example(rows=[BEHIND_A_TOKEN])
@example(rows=[BEHIND_A_BLOCK, BEHIND_A_TOKEN])
def test_training_rows_by_anchors_and_segments(rows: list[TrainingRow]):
    batch = batch_of(rows)
    mask = masks.training_mask(**batch)
    for number, row in enumerate(rows):
        count = len(row.ids)
        for query in range(mask.shape[1]):
            expected = [query == key for key in range(mask.shape[1])]  # padding attends to itself alone
            if query < count:
                expected = [key < count and trains_naively(row, query, key) for key in range(mask.shape[1])]
            assert mask[number, query].tolist() == expected


def test_a_block_before_the_first_token_attends_to_itself_alone():
    mask = masks.training_mask(**batch_of([BEHIND_A_TOKEN]))[0]
    block = slice(5, 7)
    assert mask[block, block].all()
    assert not mask[block, :5].any()
    assert not mask[:5, block].any()


@settings(max_examples=40, deadline=None)
@given(rows=PACKS)
@example(rows=[BEHIND_A_TOKEN])
def test_flex_attention_has_the_dense_mask(rows: list[TrainingRow]):
    batch = batch_of(rows)
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex_attention"))
    block_mask = attention_mask(batch, model)
    assert isinstance(block_mask, BlockMask)
    count, slots = batch["segment"].shape
    row = torch.arange(count)[:, None, None]
    query, key = torch.arange(slots)[:, None], torch.arange(slots)
    flex = block_mask.mask_mod(row, torch.tensor(0), query, key)  # (B, L, L)
    assert flex.equal(masks.training_mask(**batch))


LAYOUTS = [
    CausalLayout(),
    AllMaskLayout(MASK, 3),
    NoisedBlockLayout(MASK, 1, 2),
    CanvasLayout(MASK, 1, 8),
    BlockCausalLayout(MASK, 1, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", [0, 2])
def test_layouts_of_every_method(layout, start: int):
    """Packed, with a response that begins at the first token or behind it."""
    import random

    rng = random.Random(start)
    rows = [layout.build(Example(tuple(range(2, 2 + size)), ((start, size),)), rng, 0) for size in (5, 3, 6)]
    packed = pack_rows(rows)
    mask = masks.training_mask(**batch_of([packed]))[0]
    for query in range(len(packed.ids)):
        for key in range(len(packed.ids)):
            assert mask[query, key] == trains_naively(packed, query, key)


# Inference and training feed the same layout


@settings(max_examples=80, deadline=None)
@given(tokens=st.integers(1, 6), data=st.data())
def test_decoding_feeds_mask_blocks_as_training_lays_them_out(tokens: int, data):
    """A chain with mask blocks: as training lays it out, as inference lays it out, and as a draft of one path."""
    blocks = [data.draw(st.integers(0, 3)) for _ in range(tokens)]
    draft = Draft(DraftTree.chain(range(tokens)), blocks)
    slots = fed_slots(draft)
    anchor, step = (torch.tensor([values]) for values in zip(*slots, strict=True))  # (1, S) each
    trained = masks.training_mask(torch.zeros_like(anchor), anchor, step)
    columns = slot_columns([0], len(slots))
    inferred = masks.AttentionPlan(columns, len(slots), None, masks.mask_blocks(anchor, step))
    assert inferred.mask().equal(trained)
    assert inferred.positions.equal(anchor + step)
    _, *layout = torch.tensor([draft.layout(MASK, draft.slots)]).unbind(1)
    drafted = masks.AttentionPlan(columns, len(slots), None, masks.AttentionIntervals(*layout))
    assert drafted.mask().equal(trained)
    assert drafted.positions.equal(inferred.positions)
