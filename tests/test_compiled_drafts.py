"""Drafts of all rows by compiled code, against the same row by row; random numbers and choices of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.common.paths import resource
from fluid_model import FluidSettings, load
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import fluid, sampling
from fluid_model.decoders.compiled_drafts import CompiledDrafts, open_drafts
from fluid_model.decoders.draft_rows import DraftLayout, DraftLimits, DraftRows, Predictions
from fluid_model.decoders.sampling import Draws, choose
from fluid_model.engine.strategy import Updates
from fluid_model.forward import compiled

from .test_laws import write
from .test_rounds import requests

VOCABULARY = 4
"""So small that drafts are often right, and candidates often equal."""
MASK = 99

needs_compiler = pytest.mark.skipif(
    compiled.library(compiled.native_lanes()) is None, reason=f"no compiled code: {compiled.why_not(4)}"
)


def predictions(layout: DraftLayout, limits: DraftLimits, generator: torch.Generator, *, coarse: bool) -> Predictions:
    """Random ones. coarse: with many equal probabilities, and zeros."""
    nodes, masks = layout.total_nodes, layout.total_slots - layout.total_nodes
    chances = torch.rand(masks, 6, generator=generator) ** 3
    ranked = (chances / chances.sum(-1, keepdim=True)).sort(-1, descending=True).values[:, : limits.candidates]
    ranked = (8 * ranked).round() / 8 if coarse else ranked
    tokens, strides, candidates = (
        torch.randint(low, high, size, generator=generator)
        for low, high, size in (
            (0, VOCABULARY, (nodes,)), (1, limits.max_stride + 1, (nodes,)), (0, VOCABULARY, ranked.shape),
        )
    )  # fmt: skip
    return Predictions(tokens, strides, candidates, ranked)


def same_layout(one: DraftLayout, other: DraftLayout) -> bool:
    rows = ((each.nodes.tolist(), each.widths.tolist(), each.total_nodes, each.total_slots) for each in (one, other))
    return torch.equal(one.numbers, other.numbers) and next(rows) == next(rows)


def by_row(updates: Updates) -> list[tuple[list[int], int, int, float, int | None, list[int]]]:
    """Tokens, slots kept, stride, expected tokens and rejected draft of each row."""
    assert updates.strides is not None
    assert updates.expected is not None
    assert updates.rejected is not None
    missed = updates.rejected
    rows = zip(
        updates.tokens.tolist(), updates.lengths.tolist(), updates.kept.tolist(), updates.strides.tolist(),
        updates.expected.tolist(), missed.places.tolist(), missed.counts.tolist(), missed.ids.tolist(), strict=True,
    )  # fmt: skip
    return [
        (tokens[:length], kept, stride, round(expected, 9), place if count else None, ids[:count])
        for tokens, length, kept, stride, expected, place, count, ids in rows
    ]


@needs_compiler
@settings(max_examples=120, deadline=None)
@given(
    limits=st.builds(
        DraftLimits, st.sampled_from([1, 4]), st.sampled_from([2, 5, 16]), st.sampled_from([32, 40, 300]),
        st.sampled_from([1, 2, 4]),
    ),
    rows=st.integers(1, 4), seed=st.integers(0, 2**31), coarse=st.booleans(),
    costs=st.lists(st.sampled_from([0.001, 0.01, 0.125, 0.3, 0.9]), min_size=4, max_size=4),
    rates=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.9]), min_size=4, max_size=4),
)  # fmt: skip
def test_all_rows_at_once_are_row_by_row(limits, rows, seed, coarse, costs, rates):
    """The same slots are fed, paths accepted, tokens committed and trees grown; rows move and begin anew, too."""
    generator = torch.Generator().manual_seed(seed)
    both = DraftRows(rows, limits), open_drafts(rows, limits, verify=True)
    assert isinstance(both[1], CompiledDrafts)
    for row in range(rows):
        masks = int(torch.randint(0, limits.max_stride, (), generator=generator))
        for drafts in both:
            drafts.restart(row, row, masks)
    for step in range(4):
        expected, layout = (drafts.lay_out(0, rows, MASK) for drafts in both)
        assert same_layout(expected, layout)
        predicted = predictions(layout, limits, generator, coarse=coarse)
        left = torch.randint(1, 40, (rows,), generator=generator).tolist()
        priced = np.array(costs[:rows]), np.array(rates[:rows])
        theirs, ours = (drafts.advance(0, predicted, left, *priced) for drafts in both)
        assert by_row(ours) == by_row(theirs)
        assert list(map(tuple, ours.moves)) == theirs.moves
        assert (ours.ages, ours.is_full, ours.dropped) == (None, None, None)
        for drafts in both:
            drafts.move(rows - 1, step % rows)
            drafts.restart(rows - 1, 2, step % limits.max_stride)
        wide = limits.max_slots + 3
        assert same_layout(*(drafts.lay_out(rows - 1, 1, MASK, wide) for drafts in both)), "one row, wider than it is"
    assert both[0].roots(rows) == both[1].roots(rows)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load(str(resource("checkpoints") / "tiny-fluid"))


@needs_compiler
@pytest.mark.parametrize("decoder", [FluidSettings(slot_budget=40), FluidSettings(slot_budget=8, temperature=0.8)])
def test_answers_and_traces_are_the_same_without_a_compiler(checkpoint, monkeypatch, decoder):
    work = [replace(each, seed=number) for number, each in enumerate(requests(checkpoint))]
    ours = write(checkpoint, decoder, work, 3)
    opened = []
    monkeypatch.setattr(fluid, "open_drafts", lambda rows, limits, **_: opened.append(rows) or DraftRows(rows, limits))
    theirs = write(checkpoint, decoder, work, 3)
    assert opened
    assert {key: (g.ids, g.trace) for key, g in ours.items()} == {key: (g.ids, g.trace) for key, g in theirs.items()}
    assert any(max(g.trace.accepted) > 1 for g in ours.values())


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=20), st.integers(0, 99))
def test_a_places_number_is_the_same_however_far_one_looks_ahead(looks, seed):
    generator, draws = torch.Generator().manual_seed(seed), Draws(3, ahead=40)
    expected = torch.stack([torch.rand((), generator=generator) for _ in range(900)])
    draws.seed(0, seed + 1)
    draws.seed(2, seed)
    draws.move(2, 1)
    place = 0
    for count, committed in looks:
        assert torch.equal(draws.peek(slice(1, 2), count)[0], expected[place : place + count])
        draws.advance(slice(1, 2), [min(committed, count)])
        place += min(committed, count)


@pytest.mark.parametrize("rule", ["probability", "margin"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.0, 0.8), (1.0, 1.0), (0.5, 1.0), (1.3, 0.9)])
def test_ranking_the_likeliest_is_ranking_all(monkeypatch, temperature, top_p, rule):
    """Also where equals compete and where the nucleus or the random number reaches beyond them."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(400, 300, generator=generator)
    logits = torch.cat([flat, 6 * flat, (2 * flat).round(), torch.zeros(9, 300)])
    draws = torch.rand(len(logits), generator=generator)
    tokens, confidences = choose(logits, draws, temperature, top_p, rule)
    monkeypatch.setattr(sampling, "LIKELIEST", 300)
    expected, scores = choose(logits, draws, temperature, top_p, rule)
    assert torch.equal(tokens, expected)
    assert torch.allclose(confidences, scores, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -torch.nan])
def test_what_is_not_finite_is_seen(bad):
    numbers = torch.randn(3, 7, 5) * 1e38
    assert compiled.all_finite(numbers.clamp(-3e38, 3e38))
    for place in (0, 50, 104):
        broken = numbers.clamp(-3e38, 3e38)
        broken.flatten()[place] = bad
        assert compiled.all_finite(broken) is False
    assert compiled.all_finite(numbers.double()) is None, "torch looks"
