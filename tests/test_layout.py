"""Rows as they are laid out for training, their masks and losses, each against brute force."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from fluid_model.forward import attention_masks as masks
from fluid_model.train.masked_layouts import BlockCausalLayout, CanvasLayout
from fluid_model.train.row_layouts import (
    IGNORE,
    AllMaskLayout,
    CausalLayout,
    Example,
    HybridLayout,
    NoisedBlockLayout,
    TrainingRow,
    causal_row,
    pack_rows,
    weigh_per_example,
    with_mask_blocks,
)
from fluid_model.train.stages import HorizonCalibration, attention_mask, collate, row_loss, slot_losses

from .tiny import fluid_checkpoint, llama_config

MASK, END = 258, 1


@st.composite
def examples(draw):
    """A row with one or two spans of response tokens."""
    ids = tuple(draw(st.lists(st.integers(2, 250), min_size=6, max_size=16)))
    cuts = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=4)))
    if len(cuts) == 4:
        return Example(ids, ((cuts[0], cuts[1]), (cuts[2], cuts[3])))
    return Example(ids, ((cuts[0], cuts[1]),))


def wanted(example):
    return {place for start, end in example.spans for place in range(start, end)}


def batch_of(row):
    return {name: torch.tensor([getattr(row, name)]) for name in ("segment", "anchor", "step")}


LAYOUTS = st.sampled_from(
    [
        CausalLayout(),
        HybridLayout(MASK, 4, range(2, 258)),
        AllMaskLayout(MASK, 4),
        NoisedBlockLayout(MASK, END, 4),
        NoisedBlockLayout(MASK, END, 4, by_noise=True),
        CanvasLayout(MASK, END, 20),
        CanvasLayout(MASK, END, 20, shift=True),
        BlockCausalLayout(MASK, END, 4),
        BlockCausalLayout(MASK, END, 4, shift=True),
    ]
)


@settings(max_examples=60, deadline=None)
@given(example=examples(), seed=st.integers(0, 99), stage=st.sampled_from([1, 2]))
def test_fans_by_brute_force(example, seed, stage):
    rule = HybridLayout(MASK, 4, range(2, 258)) if stage == 1 else AllMaskLayout(MASK, 4)
    row = with_mask_blocks(example, rule, random.Random(seed))
    real = len(example.ids)
    base = causal_row(example)
    assert (row.ids[:real], row.labels[:real], row.positions[:real]) == (base.ids, base.labels, list(range(real)))
    for i, label in enumerate(base.labels):
        assert label == (example.ids[i + 1] if i + 1 in wanted(example) else IGNORE)
        assert base.ar_weight[i] == (label != IGNORE)
    for slot in range(real, len(row.ids)):
        anchor, step = row.anchor[slot], row.step[slot]
        assert anchor + 1 in wanted(example), "a fan hangs where a response token follows"
        assert row.positions[slot] == anchor + step
        assert row.labels[slot] == example.ids[anchor + step + 1]
        assert set(range(anchor + 1, anchor + step + 2)) <= wanted(example), "and stays inside the response"
        assert (row.ar_weight[slot], row.diff_weight[slot]) == (0, 1)
        if stage == 2:
            assert row.ids[slot] == MASK
    assert row.diff_count == len(row.ids) - real


@settings(max_examples=60, deadline=None)
@given(example=examples(), seed=st.integers(0, 99), size=st.integers(1, 6), by_noise=st.booleans())
def test_noised_blocks_by_brute_force(example, seed, size, by_noise):
    row = NoisedBlockLayout(MASK, END, size, by_noise=by_noise).build(example, random.Random(seed), step=0)
    clean = [i for i, step in enumerate(row.step) if step == 0]
    noised = [i for i, step in enumerate(row.step) if step > 0]
    ids = [row.ids[i] for i in clean]
    last_start, last_end = example.spans[-1]
    assert ids[:last_end] == list(example.ids[:last_end])
    assert set(ids[last_end:]) <= {END}
    assert (len(ids) - last_start) % size == 0
    places = wanted(example) | set(range(last_start, len(ids)))
    assert {row.positions[i] for i in noised} == places, "every response token stands in one block"
    masked = {row.positions[i] for i in noised if row.ids[i] == MASK}
    times_predicted = {}
    for i in range(len(row.ids)):
        if row.diff_weight[i]:
            place = row.positions[i] + 1
            assert row.labels[i] == ids[place]
            assert place in masked
            first = row.step[i] == 0
            assert first == all(row.positions[j] != place - 1 or row.anchor[j] == place - 1 for j in noised) or first
            times_predicted[place] = times_predicted.get(place, 0) + 1
    assert times_predicted == dict.fromkeys(masked, 1), "every masked token is said once"
    assert row.diff_count == (len(places) if by_noise else len(masked))


def test_noise_is_a_tenth_of_what_is_restored():
    """Restored slots are half of all on average; a tenth of those hold another, non-special token."""
    example = Example((7,) * 200, ((1, 200),))
    fans = [with_mask_blocks(example, HybridLayout(MASK, 16, [50, 60]), random.Random(seed)) for seed in range(20)]
    ids = [token for row in fans for token in row.ids[200:]]
    shares = {token: ids.count(token) / len(ids) for token in set(ids)}
    assert set(shares) == {MASK, 7, 50, 60}
    assert shares[MASK] == pytest.approx(0.5, abs=0.03)
    assert shares[50] + shares[60] == pytest.approx(0.05, abs=0.01)
    assert len(ids) / (20 * 198) == pytest.approx(4.25, abs=0.3), "half the positions, 8.5 slots each, less at the end"


@pytest.mark.parametrize("restore", [0.0, 0.4])
def test_some_fans_may_stay_masks(restore):
    """Of fans of 16, all but one in 17 hold a restored slot where the published rule restores."""
    rule = HybridLayout(MASK, 16, [50, 60], restore=restore)
    rng = random.Random(0)
    masks = [set(rule.draw_inputs((7,) * 16, rng)) == {MASK} for _ in range(2000)]
    assert sum(masks) / 2000 == pytest.approx(1 - restore * 16 / 17, abs=0.04)


def test_blocks_grow_as_published():
    """b(s) = min(b_max, b0 * 2^floor(s / delta))  (NBDiff)."""
    rule = NoisedBlockLayout(MASK, END, length=32, first=1, every=100)
    assert [rule.block_length(step) for step in (0, 99, 100, 250, 499, 500, 10**9)] == [1, 1, 2, 4, 16, 32, 32]
    assert NoisedBlockLayout(MASK, END, length=32).block_length(0) == 32


@settings(max_examples=40, deadline=None)
@given(example=examples(), seed=st.integers(0, 99))
def test_a_canvas_by_brute_force(example, seed):
    row = CanvasLayout(MASK, END, 20).build(example, random.Random(seed), step=0)
    end = example.spans[-1][1]
    response = wanted(example) | set(range(end, len(row.ids)))
    weights = {weight for weight in row.diff_weight if weight}
    assert len(weights) <= 1, "one t a row"
    assert all(weight >= 1 for weight in weights), "1/t"
    for i, token in enumerate(row.ids):
        original = example.ids[i] if i < end else END
        assert token == (original if row.labels[i] == IGNORE else MASK)
        assert row.labels[i] in (IGNORE, original)
        assert row.labels[i] == IGNORE or i in response
    assert row.diff_count == len(response)
    assert bool(masks.training_mask(**batch_of(row)).all()), "all read all"


@settings(max_examples=40, deadline=None)
@given(example=examples(), seed=st.integers(0, 99))
def test_a_shifted_canvas_has_its_labels_one_slot_earlier(example, seed):
    """Same masks and weights as in place, each at the slot before; the row's first token has none and is not masked."""
    example = replace(example, spans=((0, example.spans[-1][1]),))
    shifted = CanvasLayout(MASK, END, 20, shift=True).build(example, random.Random(seed), step=0)
    filled = (*example.ids[: example.spans[-1][1]], *[END] * (len(shifted.ids) - example.spans[-1][1]))
    assert shifted.ids[0] == filled[0]
    assert (shifted.labels[-1], shifted.diff_weight[-1]) == (IGNORE, 0)
    for slot, (token, label) in enumerate(zip(shifted.ids[1:], shifted.labels, strict=False)):
        assert label == (filled[slot + 1] if token == MASK else IGNORE)
        assert (shifted.diff_weight[slot] > 0) == (token == MASK)
    assert shifted.diff_count == len(filled) - 1
    assert shifted.positions == list(range(len(filled)))


def test_without_a_prompts_first_token_both_canvases_mask_alike():
    example = Example(tuple(range(5, 45)), ((6, 40),))
    rows = [CanvasLayout(MASK, END, 50, shift).build(example, random.Random(3), 0) for shift in (False, True)]
    assert rows[0].ids == rows[1].ids
    assert rows[0].labels[1:] == rows[1].labels[:-1]
    assert rows[0].diff_weight[1:] == rows[1].diff_weight[:-1]
    assert rows[0].diff_count == rows[1].diff_count


def test_a_canvas_weighs_masked_tokens_by_their_rarity():
    """1/t, so that a row's weights come to its number of response tokens on average.  (LLaDA)"""
    example = Example(tuple(range(5, 45)), ((6, 40),))
    row = CanvasLayout(MASK, END, noise_level=0.25).build(example, random.Random(0), 0)
    assert {weight for weight in row.diff_weight if weight} == {4.0}
    drawn = [CanvasLayout(MASK, END).build(example, random.Random(seed), 0) for seed in range(3000)]
    shares = torch.tensor([sum(row.diff_weight) / row.diff_count for row in drawn])
    assert float(shares.mean()) == pytest.approx(1.0, abs=4 * float(shares.std()) / 3000**0.5)


def test_horizons_are_measured_alike_in_packs():
    """A packed fan's anchor is its own row's token: same hidden states, losses and strides as alone."""
    checkpoint = fluid_checkpoint()
    horizons = HorizonCalibration(checkpoint.model, 4, [1.0])
    examples = [Example(tuple(range(5, 25)), ((6, 20),)), Example(tuple(range(40, 52)), ((1, 12),))]
    laid = [with_mask_blocks(e, AllMaskLayout(checkpoint.mask_id, 4), random.Random(3)) for e in examples]
    apart = [horizons.block_losses(collate([pack_rows([row])])) for row in laid]
    together = horizons.block_losses(collate([pack_rows(laid)]))
    for measured, parts in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.allclose(measured.float(), torch.cat(parts).float(), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(examples(), min_size=1, max_size=3), rule=LAYOUTS, seed=st.integers(0, 99))
def test_who_reads_whom_by_brute_force(rows, rule, seed):
    """No slot reads another example, another fan or block, or anything after what its decoder would hold."""
    laid = [rule.build(example, random.Random(seed), 0) for example in rows]
    packed = pack_rows(laid)
    may = masks.training_mask(**batch_of(packed))[0]
    origin = [(n, slot) for n, row in enumerate(laid) for slot in range(len(row.ids))]
    for q, (mine, query) in enumerate(origin):
        for k, (other, key) in enumerate(origin):
            row = laid[mine]
            if mine != other:
                allowed = False
            elif isinstance(rule, CanvasLayout):
                allowed = True
            elif isinstance(rule, BlockCausalLayout) and row.step[key] == 0:
                own, other_block = row.positions[query] // 4, row.positions[key] // 4
                allowed = other_block < own or (other_block == own and row.step[query] == 0)
            elif row.step[key] == 0:
                allowed = row.positions[key] <= (row.positions[query] if row.step[query] == 0 else row.anchor[query])
            else:
                causal = (
                    isinstance(rule, NoisedBlockLayout | BlockCausalLayout)
                    or row.positions[key] <= row.positions[query]
                )
                allowed = row.step[query] > 0 and row.anchor[key] == row.anchor[query] and causal
            assert bool(may[q, k]) == allowed


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(examples(), min_size=2, max_size=3), rule=LAYOUTS, seed=st.integers(0, 99))
def test_a_packed_example_loses_what_it_loses_alone(rows, rule, seed):
    checkpoint = fluid_checkpoint()
    laid = [rule.build(example, random.Random(seed), 0) for example in rows]
    with torch.no_grad():
        alone = [slot_losses(checkpoint.model, checkpoint.model, collate([row])) for row in laid]
        packed = slot_losses(checkpoint.model, checkpoint.model, collate([pack_rows(laid)]))
        padded = slot_losses(checkpoint.model, checkpoint.model, collate(laid))
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)
    assert torch.allclose(padded, torch.cat(alone), atol=1e-4)


def test_the_training_layout_is_what_the_decoder_feeds():
    """A fan's losses are those of the prefix followed by the same masks, as the sampler's canvas is fed."""
    checkpoint = fluid_checkpoint()
    model, mask = checkpoint.model, checkpoint.mask_id
    examples = [Example(tuple(range(5, 25)), ((6, 20),)), Example(tuple(range(40, 52)), ((1, 12),))]
    rows = [with_mask_blocks(e, AllMaskLayout(mask, 5, probability=0.7), random.Random(3)) for e in examples]
    with torch.no_grad():
        losses = slot_losses(model, model, collate(rows))
    remaining = iter(losses.tolist())
    checked = 0
    for example, row in zip(examples, rows, strict=True):
        for slot, label in enumerate(row.labels):
            if label == IGNORE:
                continue
            fed = [*example.ids[: row.anchor[slot] + 1], *[mask] * row.step[slot]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([fed])).logits[0, -1]
            expected = functional.cross_entropy(logits, torch.tensor(label))
            assert next(remaining) == pytest.approx(float(expected), abs=1e-4)
            checked += row.step[slot] > 0
    assert checked > 20


def test_blocks_of_one_lose_what_autoregression_loses():
    """AR is block diffusion of block size 1 (NBDiff): all masked, L_Diff is L_AR; with t drawn, 1/t weighs it so."""
    checkpoint = fluid_checkpoint()
    model = checkpoint.model
    example = Example(tuple(range(5, 45)), ((6, 40),))

    def terms(rule, seed=0):
        with torch.no_grad():
            row = rule.build(example, random.Random(seed), 0)
            return row_loss(model, model, collate([row]), (0.5, 1.0))

    loss, loss_terms = terms(NoisedBlockLayout(checkpoint.mask_id, END, 1, noise_level=1.0))
    assert float(loss_terms["l_diff"]) == pytest.approx(float(loss_terms["l_ar"]), abs=1e-5)
    assert float(loss) == pytest.approx(1.5 * float(loss_terms["l_ar"]), abs=1e-5)
    drawn = [
        terms(NoisedBlockLayout(checkpoint.mask_id, END, 1, by_noise=True), seed)[1]["l_diff"] for seed in range(400)
    ]
    spread = float(torch.stack(drawn).std()) / 400**0.5
    assert float(torch.stack(drawn).mean()) == pytest.approx(float(loss_terms["l_ar"]), abs=4 * spread)


def test_a_block_is_read_as_the_decoder_reads_it():
    """A noised block's logits are those of the clean prefix and the block alone, bidirectional inside the block."""
    checkpoint = fluid_checkpoint()
    model, mask = checkpoint.model, checkpoint.mask_id
    example = Example(tuple(range(5, 25)), ((8, 20),))
    row = NoisedBlockLayout(mask, END, 4).build(example, random.Random(8), 0)
    with torch.no_grad():
        losses = slot_losses(model, model, collate([row]))
    labelled = [slot for slot, label in enumerate(row.labels) if label != IGNORE]
    checked = 0
    for low in (8, 12, 16):
        block = [slot for slot in range(len(row.ids)) if row.step[slot] and low <= row.positions[slot] < low + 4]
        fed = torch.tensor([[*example.ids[:low], *[row.ids[slot] for slot in block]]])
        may = torch.ones(low + 4, low + 4).tril().bool()
        may[low:, low:] = True
        bias = torch.zeros(1, 1, low + 4, low + 4).masked_fill(~may, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(input_ids=fed, attention_mask=bias).logits[0, low:]
        for j, slot in enumerate(block):
            if row.labels[slot] != IGNORE:
                expected = functional.cross_entropy(logits[j], torch.tensor(row.labels[slot]))
                assert float(losses[labelled.index(slot)]) == pytest.approx(float(expected), abs=1e-4)
                checked += 1
    assert checked >= 3


def test_rows_weighed_alike_count_alike():
    rows = [causal_row(Example((5, 6, 7), ((1, 3),))), causal_row(Example(tuple(range(9)), ((1, 9),)))]
    batch = collate([pack_rows([weigh_per_example(row) for row in rows])])
    weights = batch["ar_weight"][0]
    assert float(weights[:3].sum()) == pytest.approx(1)
    assert float(weights[3:].sum()) == pytest.approx(1)
    canvas = weigh_per_example(
        CanvasLayout(MASK, END, noise_level=1.0).build(Example((5, 6, 7, 8), ((2, 4),)), random.Random(0), 0)
    )
    assert (canvas.diff_weight, canvas.diff_count) == ([0, 0, 0.5, 0.5], 1)


def test_plain_rows_are_left_to_the_models_own_mask():
    batch = collate([causal_row(Example((5, 6, 7), ((1, 3),))), causal_row(Example((8, 9), ((1, 2),)))])
    assert "segment" not in batch
    assert batch["ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert "segment" in collate([pack_rows([causal_row(Example((5, 6), ((1, 2),)))] * 2)])
    assert collate([TrainingRow([1], [0], [IGNORE], [0], [0], [0], [0.0], [0.0])], 8)["ids"].shape == (1, 8)


def packed_rows(checkpoint, rule):
    examples = [Example(tuple(range(5, 45)), ((6, 40),)), Example(tuple(range(7, 30)), ((3, 23),))]
    return [pack_rows([rule.build(example, random.Random(n), 0) for example in examples]) for n in range(2)]


RULES = [
    HybridLayout(MASK, 4, range(2, 258)),
    NoisedBlockLayout(MASK, END, 4),
    CanvasLayout(MASK, END, 30),
    BlockCausalLayout(MASK, END, 8),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_flex_attention_loses_what_dense_masks_lose(rule):
    """On the CPU FlexAttention has no backward and is not compiled here; the gpu test has both."""
    checkpoint = fluid_checkpoint()
    model, rows = checkpoint.model, packed_rows(checkpoint, rule)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        dense = slot_losses(model, model, collate(rows))
        model.set_attn_implementation("flex_attention")
        batch = collate(rows, 128)
        assert isinstance(attention_mask(batch, model), BlockMask)
        assert torch.allclose(slot_losses(model, model, batch), dense, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_flex_attention_on_cuda_learns_what_dense_masks_learn(rule):
    checkpoint = fluid_checkpoint(config=llama_config(hidden_size=128))  # heads of 32; CUDA wants 16 at least
    model = checkpoint.model.cuda()
    both = []
    for kind in ("sdpa", "flex_attention"):
        model.set_attn_implementation(kind)
        model.zero_grad()
        batch = collate(packed_rows(checkpoint, rule), 128)
        loss, _ = row_loss(model, model, {name: value.cuda() for name, value in batch.items()}, (1.0, 1.0))
        loss.backward()
        both.append((loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    assert torch.allclose(both[0][0], both[1][0], rtol=1e-3)
    assert all(torch.allclose(a, b, atol=1e-2, rtol=1e-2) for a, b in zip(both[0][1], both[1][1], strict=True))
