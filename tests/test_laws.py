"""The laws every decoder keeps, on small random models and on real weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fluid_model
from bench.field.plain_causal import plain_fluid
from fluid_model import ArSettings, FluidSettings, Request
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.forward.khead import KHead
from fluid_model.forward.kv_cache import KVCache

from .tiny import fluid_checkpoint

NEW = 40
CHECKPOINT = fluid_checkpoint()
PROMPTS = [f"Question {'?' * n}: what is {n} + {n}?".encode() for n in range(7)]


def requests(count: int = len(PROMPTS), new_tokens: int = NEW) -> list[Request]:
    return [Request(str(i), tuple(b + 2 for b in PROMPTS[i]), new_tokens, seed=i) for i in range(count)]


def write(checkpoint: Checkpoint, decoder, work, batch_size: int = 4) -> dict[str, fluid_model.Generation]:
    return {g.key: g for g in fluid_model.engine_for(checkpoint, decoder, batch_size).generate(work)}


def calls_of(checkpoint: Checkpoint) -> list[int]:
    """Appends 1 at every call of the backbone's own model, until the process ends."""
    seen: list[int] = []
    checkpoint.model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    compiled = checkpoint.backbone.compiled
    if compiled is not None:  # it calls no module

        def call(*words):
            seen.append(1)
            return compiled(*words)

        for name in ("projects_vocabulary", "logits", "stored"):
            setattr(call, name, getattr(compiled, name))
        checkpoint.backbone.compiled = call
    return seen


def test_the_future_never_changes_the_past():
    backbone = CHECKPOINT.backbone
    ids = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 258
    hidden = []
    for row in (ids, changed):
        cache = KVCache(2, 12)
        hidden.append(backbone.forward(row, cache.set_write_positions(0, [0, 0], 12, backbone.device), cache))
    assert torch.equal(hidden[0][:, :7], hidden[1][:, :7])
    assert not torch.allclose(hidden[0][:, 7:], hidden[1][:, 7:])


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, 11), slot=st.integers(0, 2), junk=st.integers(0, 257))
def test_cached_equals_uncached(cut: int, slot: int, junk: int):
    """Feeding in two pieces, after a rejected suffix was overwritten, gives the hidden states of feeding at once."""
    backbone = CHECKPOINT.backbone
    ids = torch.arange(12)[None] * 7 % 258
    uncached = KVCache(1, 12)
    expected = backbone.forward(ids, uncached.set_write_positions(0, [0], 12, backbone.device), uncached)
    cache, pieces = KVCache(3, 20), []
    for start, piece, keep in (
        (0, ids[:, :cut], True),
        (cut, torch.full((1, 5), junk), False),
        (cut, ids[:, cut:], True),
    ):
        hidden = backbone.forward(
            piece, cache.set_write_positions(slot, [start], piece.shape[1], backbone.device), cache
        )
        pieces += [hidden] if keep else []
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)


REFERENCE = FluidSettings(rounds="reference")


@pytest.mark.parametrize(
    "decoder",
    [
        ArSettings(),
        ArSettings(temperature=0.8, top_p=0.9),
        FluidSettings(slot_budget=64),
        FluidSettings(slot_budget=64, temperature=0.8, top_p=0.9),
        FluidSettings(verify=False, confidence=0.1),
        REFERENCE,
        replace(REFERENCE, verify=False),
    ],
)
def test_a_row_of_a_batch_is_the_row_alone(decoder):
    alone = {}
    for request in requests():
        alone |= write(CHECKPOINT, decoder, [request], batch_size=1)
    for slots in (2, 3, 7):
        together = write(CHECKPOINT, decoder, requests(), slots)
        for key, expected in alone.items():
            assert together[key].ids == expected.ids
            if not (isinstance(decoder, FluidSettings) and decoder.rounds == "one" and decoder.verify):
                # there rows that share a forward feed less each
                assert together[key].trace == expected.trace


HEAT = {"temperature": 0.7, "top_p": 0.95}


@cache
def by_ar(warm: bool) -> dict[str, fluid_model.Generation]:
    return write(CHECKPOINT, ArSettings(**(HEAT if warm else {})), requests(5))


@settings(max_examples=25, deadline=None)
@given(
    confidence=st.floats(0, 1),
    floor=st.integers(1, 6),
    extra=st.integers(0, 10),
    head_seed=st.integers(0, 99),
    slots=st.integers(1, 5),
    budget=st.integers(1, 1000),
    rounds=st.sampled_from(["one", "reference"]),
    warm=st.booleans(),
)
def test_verified_fluid_writes_what_ar_writes(confidence, floor, extra, head_seed, slots, budget, rounds, warm):
    """Sampled text too: every token comes from the causal logits and the random number AR would use there."""
    torch.manual_seed(head_seed)
    checkpoint = replace(CHECKPOINT, head=KHead(32, 8))
    heat = HEAT if warm and rounds == "one" else {}
    decoder = FluidSettings(
        rounds=rounds, confidence=confidence, min_horizon=floor, max_horizon=floor + extra, slot_budget=budget, **heat
    )
    expected = by_ar(bool(heat))
    answers = write(checkpoint, decoder, requests(5), slots)
    assert {k: (g.ids, g.text, g.finish) for k, g in answers.items()} == {
        k: (g.ids, g.text, g.finish) for k, g in expected.items()
    }


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("confidence", "floor"), [(0.0, 1), (0.15, 8), (0.3, 6), (0.6, 1), (0.9, 3), (1.0, 1)])
def test_fluid_is_the_published_sampler(verify: bool, confidence: float, floor: int):
    """Same texts and the same forwards, kind by kind."""
    decoder, work = replace(REFERENCE, confidence=confidence, min_horizon=floor, verify=verify), requests(5, 24)
    answers = write(CHECKPOINT, decoder, work)
    for request in work:
        answer = answers[request.key]
        assert (answer.ids, answer.trace.forwards) == plain_fluid(CHECKPOINT, request, decoder)


def test_the_published_sampler_trades_text_for_speed_only_without_verification():
    """The tests above would prove little if drafts were always or never right."""
    expected = write(CHECKPOINT, ArSettings(), requests())
    verified = write(CHECKPOINT, replace(REFERENCE, confidence=0.0), requests())
    loose = write(CHECKPOINT, replace(REFERENCE, confidence=0.0, verify=False), requests())
    assert any(loose[k].ids != expected[k].ids for k in expected)
    traces = [g.trace for g in verified.values()]
    assert any(a < p for t in traces for p, a in zip(t.predicted, t.accepted, strict=False))
    assert any(a > 1 for t in traces for a in t.accepted)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("rounds", ["one", "reference"])
def test_a_horizon_of_one_is_ar(verify: bool, rounds):
    expected = write(CHECKPOINT, ArSettings(), requests())
    answers = write(CHECKPOINT, FluidSettings(rounds=rounds, slot_budget=64, max_horizon=1, verify=verify), requests())
    assert {k: g.ids for k, g in answers.items()} == {k: g.ids for k, g in expected.items()}
    assert all(set(g.trace.predicted) == {1} for g in answers.values())
    if rounds == "one":
        cost = {k: (sum(g.trace.forwards.values()), g.trace.slots) for k, g in expected.items()}
        assert {k: (sum(g.trace.forwards.values()), g.trace.slots) for k, g in answers.items()} == cost


@pytest.mark.parametrize(
    "decoder",
    [ArSettings(), FluidSettings(slot_budget=64), REFERENCE, replace(REFERENCE, verify=False, confidence=0.5)],
)
def test_counted_forwards_are_the_calls_the_model_sees(decoder):
    checkpoint = fluid_checkpoint()
    seen = calls_of(checkpoint)
    engine = fluid_model.engine_for(checkpoint, decoder, batch_size=3)
    seen.clear()  # what slots cost was measured
    list(engine.generate(requests()))
    assert engine.calls == len(seen)
    seen.clear()
    (alone,) = write(checkpoint, decoder, requests(1)).values()
    assert sum(alone.trace.forwards.values()) == len(seen)
    if isinstance(decoder, ArSettings):
        assert len(seen) == len(alone.ids) == NEW


def test_sampling_follows_the_distribution():
    """20,000 draws of one token against softmax(logits / T) cut to the nucleus: chi-square within its 99.9% bound."""
    from scipy.stats import chisquare

    from fluid_model.decoders.sampling import choose

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, generator=generator)
    draws = torch.rand(20_000, generator=generator)
    for temperature, top_p in ((1.0, 1.0), (0.9, 0.9)):
        tokens, _ = choose(logits.expand(len(draws), -1), draws, temperature, top_p, "probability")
        expected = (logits[0] / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        kept = order[: int((expected[order].cumsum(0) - expected[order] < top_p).sum())]
        counts = torch.bincount(tokens, minlength=6)
        assert counts[kept].sum() == len(draws), "nothing outside the nucleus"
        share = expected[kept] / expected[kept].sum()
        assert chisquare(counts[kept].numpy(), (share * len(draws)).double().numpy(), sum_check=False).pvalue > 0.001
