"""NBDiff and LLaDA decode as plain, slow versions of their public code do, alone or in batches: ids and forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.field.plain_blocks import plain_nbdiff
from bench.field.plain_canvas import plain_llada
from fluid_model import ArSettings, Request
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import strategy_for
from fluid_model.settings.block_diffusion import NbdiffSettings
from fluid_model.settings.masked_diffusion import LladaSettings

from .test_laws import CHECKPOINT, requests, write
from .tiny import fluid_checkpoint

NEW = 13
REQUEST_SEED = 3


@settings(max_examples=9, deadline=None)
@given(
    rule=st.sampled_from(["probability", "margin", "entropy"]),
    threshold=st.sampled_from([None, 0.02, 0.2]),
    parts=st.sampled_from([(1, 1), (1, 8), (3, 3), (4, 1), (6, 2), (7, 1), (8, 4), (8, 8)]),
)
def test_nbdiff_is_the_public_decoder(rule, threshold, parts):
    length, small = parts
    if rule == "entropy":
        bounds = {"max_entropy": None if threshold is None else 4.5 + threshold}
    else:
        bounds = {"confidence": threshold}
    decoder = NbdiffSettings(block_length=length, small_blocks=small, rule=rule, **bounds)
    answers = write(CHECKPOINT, decoder, requests(3, NEW), batch_size=2)
    for request in requests(3, NEW):
        ids, count = plain_nbdiff(CHECKPOINT, request, decoder)
        assert (answers[request.key].ids, answers[request.key].trace.forwards) == (ids, count)


def with_ends(checkpoint: Checkpoint, scale: float = 2.0, mask_scale: float = 1.0) -> Checkpoint:
    """The tokenizer's end and another one, which this model writes often; and its mask, if asked."""
    checkpoint = replace(checkpoint, end_ids=(1, 9))
    weights = checkpoint.model.get_output_embeddings().weight
    with torch.no_grad():
        weights[[1, 9]] *= scale
        weights[checkpoint.mask_id] *= mask_scale
    return checkpoint


LLADA = [
    {"block_length": 4},
    {"block_length": 8, "steps": 4},
    {"gen_length": 16, "block_length": 16, "steps": 6},
    {"block_length": 4, "guidance": 0.5},
]


@pytest.mark.parametrize("values", LLADA)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"suppress_end": True},
        {"logits_eos_inf": True},
        {"suppress_end": True, "temperature": 0.7},
        {"suppress_end": True, "logits_eos_inf": True, "temperature": 0.7},
        {"suppress_end": True, "remasking": "random"},
        {"shift": True},
        {"shift": True, "suppress_end": True, "temperature": 0.7},
    ],
)
def test_llada_is_the_public_decoder(values, more):
    """Where end and mask are likely: in ids whether the canvas is filled to its end or not, in forwards if it is."""
    checkpoint = with_ends(fluid_checkpoint(), mask_scale=3.0)
    decoder = LladaSettings(**values, **more)
    work = [replace(request, seed=REQUEST_SEED) for request in requests(2, NEW)]
    early = write(checkpoint, decoder, work, batch_size=2)
    full_canvas = write(checkpoint, replace(decoder, whole_canvas=True), work, batch_size=3)
    for request in work:
        ids, forwards = plain_llada(checkpoint, request, decoder)
        assert full_canvas[request.key].ids == early[request.key].ids == ids
        assert full_canvas[request.key].trace.forwards == forwards
        assert early[request.key].trace.forwards["denoise"] <= forwards["denoise"]


def test_an_end_that_is_taken_away_leaves_its_confidence_to_the_others():
    """What is less sure of a token but surer of the end is written first then."""
    checkpoint = with_ends(fluid_checkpoint())
    chosen = {}
    for suppress in (False, True):
        strategy = strategy_for(checkpoint, LladaSettings(block_length=2, steps=2, suppress_end=suppress))
        strategy.allocate(1)
        strategy.admit(0, [Request("x", (5, 6), 2)], None, [256])
        logits = torch.full((2, 259), -20.0)
        logits[0, [30, 31]] = torch.tensor([0.6, 0.4]).log()  # 0.6 either way
        logits[1, [40, 1]] = torch.tensor([0.51, 0.49]).log()  # 0.51, or all
        (row,) = strategy._states(1)
        strategy._denoise(row, strategy._open_slots(row), logits)
        chosen[suppress] = [token != checkpoint.mask_id for token in row.ids[2:].tolist()]
    assert chosen == {False: [True, False], True: [False, True]}


def test_blocks_of_one_are_ar():
    """But for the commit of a last token that is no end, which the public code runs."""
    ar = write(CHECKPOINT, ArSettings(), requests())
    blocks = write(CHECKPOINT, NbdiffSettings(block_length=1, small_blocks=1), requests())
    assert {key: g.ids for key, g in blocks.items()} == {key: g.ids for key, g in ar.items()}
    for key, one in ar.items():
        last = one.finish != "eos"
        assert blocks[key].trace.forwards == {
            **one.trace.forwards,
            "commit": one.trace.forwards["commit"] + last,
        }


@pytest.mark.parametrize("end", range(NEW))
def test_nbdiff_looks_for_the_end_after_every_small_block(end):
    """Wherever in a block it is written, first and last places of small blocks among them."""
    decoder = NbdiffSettings(block_length=6, small_blocks=3, confidence=0.05)
    (request,) = requests(1, 18)
    free, _ = plain_nbdiff(replace(CHECKPOINT, end_ids=()), request, decoder)
    checkpoint = replace(CHECKPOINT, end_ids=(free[end], free[0] + 300))
    (got,) = write(checkpoint, decoder, [request]).values()
    ids, count = plain_nbdiff(checkpoint, request, decoder)
    assert (got.ids, got.finish, got.trace.forwards) == (ids, "eos", count)


def test_a_mask_that_is_predicted_stays_open_in_a_block_while_others_are_written():
    checkpoint = with_ends(fluid_checkpoint(1), scale=1.0, mask_scale=2.0)
    decoder = NbdiffSettings(block_length=8, small_blocks=1, confidence=0.02)
    compared = 0
    for request in requests(7, 24):
        got = write(checkpoint, decoder, [request])[request.key]
        if checkpoint.mask_id in got.ids:  # nothing else was written: the public code would go on for ever
            continue
        assert (got.ids, got.trace.forwards) == plain_nbdiff(checkpoint, request, decoder)
        compared += 1
    assert compared
