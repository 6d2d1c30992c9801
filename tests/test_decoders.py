"""NBDiff and LLaDA: canvases and windows, random numbers, sureness, settings, likelihoods."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from bench.field.plain import causal, cut, forward
from fluid_model import ConfigError, Manifest, Request
from fluid_model.decoders import scorer_for, strategy_for
from fluid_model.decoders.sampling import choose
from fluid_model.engine.records import ScoreRequest
from fluid_model.scoring.monte_carlo import CanvasScorer
from fluid_model.settings.block_diffusion import NbdiffSettings
from fluid_model.settings.masked_diffusion import LladaSettings
from fluid_model.settings.wedlm import WedlmSettings

from .test_laws import CHECKPOINT, calls_of, requests, write
from .test_samplers import NEW
from .tiny import fluid_checkpoint


def both_ways(ids):
    """Logits of a row that reads in both directions."""
    return forward(CHECKPOINT, ids, causal(len(ids), both_from=0))


def test_an_answer_ends_with_its_canvas():
    """Shorter than the answer may be, and never ended by the model."""
    decoder = LladaSettings(gen_length=8, block_length=4)
    answers = write(replace(CHECKPOINT, end_ids=()), decoder, requests(3, 40), batch_size=2)
    assert {(len(g.ids), g.finish, g.trace.forwards["denoise"]) for g in answers.values()} == {(8, "length", 8)}


def test_a_canvas_may_be_longer_than_the_answer():
    decoder = LladaSettings(gen_length=24, block_length=4)
    answers = write(CHECKPOINT, decoder, requests(2, 6), batch_size=2)
    assert all(len(g.ids) <= 6 for g in answers.values())


def test_a_block_the_window_narrows_is_drawn_as_alone():
    """Its mates may fill wider blocks."""
    decoder = NbdiffSettings(block_length=8, small_blocks=1, confidence=None, temperature=1.0)
    long = Request("long", tuple(range(3, 244)), 15, seed=5)
    (alone,) = write(CHECKPOINT, decoder, [long]).values()
    assert write(CHECKPOINT, decoder, [long, *requests(2, 15)])["long"].ids == alone.ids


def test_nothing_outside_the_nucleus_is_drawn_where_sums_round_down():
    logits = torch.zeros(1, 50_000)
    logits[0, :3] = 20.0
    token, _ = choose(logits, torch.tensor([1 - 2**-25]), 1.0, 0.5, "probability")
    assert token.item() < 3


def test_llada_fills_left_to_right_one_a_step_in_blocks_of_one():
    decoder = LladaSettings(block_length=1)
    (request,) = requests(1, 6)
    row = list(request.prompt) + [CHECKPOINT.mask_id] * 6
    for i in range(len(request.prompt), len(row)):
        row[i] = int(both_ways(row)[i].argmax())
    got = write(CHECKPOINT, decoder, [request])[request.key]
    assert got.ids == cut(CHECKPOINT, row[len(request.prompt) :], 6)
    assert got.trace.forwards["denoise"] == len(got.ids) + (got.finish == "eos")


RANDOM = [
    NbdiffSettings(block_length=8, small_blocks=2, temperature=1.0, top_p=0.8),
    NbdiffSettings(block_length=8, confidence=0.05),
    LladaSettings(block_length=8, steps=8, temperature=0.7),
    LladaSettings(block_length=8, remasking="random", suppress_end=True, guidance=1.0),
    WedlmSettings(window=8, max_entropy=4.5),
    WedlmSettings(window=4, temperature=0.7),
]


@pytest.mark.parametrize("decoder", RANDOM)
def test_a_row_of_a_batch_is_the_row_alone(decoder):
    together = write(CHECKPOINT, decoder, requests(6, NEW), batch_size=4)
    for request in requests(6, NEW):
        alone = write(CHECKPOINT, decoder, [request], batch_size=1)[request.key]
        assert together[request.key].ids == alone.ids
        assert together[request.key].trace == alone.trace
    other = write(CHECKPOINT, decoder, [replace(r, seed=r.seed + 99) for r in requests(6, NEW)])
    drawn = decoder.temperature > 0 or getattr(decoder, "remasking", "") == "random"
    assert (other["0"].ids != together["0"].ids or other["1"].ids != together["1"].ids) == drawn


@pytest.mark.parametrize("decoder", RANDOM)
def test_counted_forwards_are_the_calls_the_model_sees(decoder):
    checkpoint = fluid_checkpoint()
    seen = calls_of(checkpoint)
    (got,) = write(checkpoint, decoder, requests(1, NEW), batch_size=1).values()
    assert sum(got.trace.forwards.values()) == len(seen)
    assert len(got.ids) <= NEW


@pytest.mark.parametrize("suppress", [False, True])
def test_end_tokens_are_written_last_where_asked(suppress):
    """With every slot but the first sure of the end token, and the first less sure of another."""
    checkpoint = fluid_checkpoint()
    (request,) = requests(1, 8)

    def pretend(slots):
        logits = torch.zeros(len(slots), 259)
        logits[..., checkpoint.end_ids[0]] = 20.0
        logits[0] = 0.0
        logits[0, 77] = 10.0
        return logits

    checkpoint.backbone._projected = pretend
    decoder = LladaSettings(block_length=8, suppress_end=suppress)
    strategy = strategy_for(checkpoint, decoder)
    strategy.allocate(1)
    strategy.admit(0, [request], None, [256])
    feed = strategy.plan(1)
    strategy.absorb(feed, torch.zeros(1, feed.ids.shape[1], 32), [256])
    canvas = strategy.plan(1).ids[0, len(request.prompt) :].tolist()
    first = [i for i, token in enumerate(canvas) if token != checkpoint.mask_id]
    assert len(first) == 1
    assert (first == [0]) == suppress


def test_three_ways_to_be_sure():
    """The likelier token need not have the wider margin, nor the lower entropy."""
    table = torch.tensor([[0.5, 0.45, 0.05, 0.0], [0.45, 0.2, 0.2, 0.15]]).clamp(min=1e-12)
    choices = {
        rule: choose(table.log(), torch.zeros(2), 0.0, 1.0, rule) for rule in ("probability", "margin", "entropy")
    }
    assert all(token.tolist() == [0, 0] for token, _ in choices.values())
    assert choices["probability"][1].tolist() == pytest.approx([0.5, 0.45], abs=1e-6)
    assert choices["margin"][1].tolist() == pytest.approx([0.05, 0.25], abs=1e-6)
    entropy = [-sum(p * math.log(p) for p in row if p > 1e-9) for row in table.tolist()]
    assert choices["entropy"][1].tolist() == pytest.approx([-value for value in entropy], abs=1e-5)


def test_a_canvas_beyond_the_window_is_refused():
    with pytest.raises(ConfigError, match="a canvas of 300 exceed the window, 256"):
        write(CHECKPOINT, LladaSettings(gen_length=300, block_length=100), requests(1))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (NbdiffSettings, {"confidence": 1.5}, "confidence=1.5 must lie in [0.0, 1.0]"),
        (NbdiffSettings, {"max_entropy": 0.5}, "max_entropy=0.5: at least 0, and only for rule=entropy"),
        (NbdiffSettings, {"small_blocks": 0}, "small_blocks=0 must lie in [1, 4096]"),
        (LladaSettings, {"gen_length": 10, "block_length": 4}, "gen_length=10 must be a multiple of block_length=4"),
        (NbdiffSettings, {"block_length": 12, "small_blocks": 8}, "small_blocks=8 must divide block_length=12"),
        (LladaSettings, {"steps": 0}, "steps=0 must lie in [1, 1000000]"),
        (LladaSettings, {"gen_length": 64, "steps": 65}, "steps=65 must not exceed the canvas of 64 tokens"),
        (LladaSettings, {"gen_length": 64, "steps": 33}, "steps=33 must be a multiple of the canvas's 2 blocks"),
    ],
)
def test_bad_settings_are_named(kind, values, message):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    assert message in str(caught.value)


def test_choices_of_one_token_share_one_exact_forward():
    context = tuple(range(5, 25))
    work = ScoreRequest("q", tuple((context, (token,)) for token in (30, 40, 50, 60)))
    scorer = scorer_for(CHECKPOINT, LladaSettings())
    assert isinstance(scorer, CanvasScorer)
    (score,) = scorer.score([work])
    expected = both_ways([*context, CHECKPOINT.mask_id])[-1].log_softmax(-1)
    assert score.loglikelihoods == pytest.approx([float(expected[token]) for token in (30, 40, 50, 60)], abs=1e-4)
    assert (sum(score.trace.forwards.values()), score.errors) == (1, (0, 0, 0, 0))


def test_longer_continuations_are_estimated_within_their_errors():
    """Against the sum over all masks: every count of masked tokens alike, every set of that size alike."""
    context, continuation = tuple(range(5, 25)), (30, 41, 52)
    exact = 0.0
    for count in (1, 2, 3):
        sets = list(combinations(range(3), count))
        for masked in sets:
            ids = [*context, *(CHECKPOINT.mask_id if i in masked else t for i, t in enumerate(continuation))]
            scores = both_ways(ids).log_softmax(-1)
            loglikelihood = sum(float(scores[len(context) + i, continuation[i]]) for i in masked)
            exact += loglikelihood * 3 / count / len(sets) / 3
    work = [ScoreRequest(str(n), ((context, continuation),), seed=n) for n in range(3)]
    scores = sorted(CanvasScorer(CHECKPOINT.backbone, CHECKPOINT.mask_id, 8, 200).score(work), key=lambda s: s.key)
    for score in scores:
        assert 0 < score.errors[0] < 2
        assert score.loglikelihoods[0] == pytest.approx(exact, abs=4 * score.errors[0])
    assert len({score.loglikelihoods for score in scores}) == 3, "each seed draws its own"
    (again,) = CanvasScorer(CHECKPOINT.backbone, CHECKPOINT.mask_id, 1, 200).score(work[:1])
    assert again.loglikelihoods == pytest.approx(scores[0].loglikelihoods, abs=1e-3)


def test_a_shifted_checkpoint_is_scored_and_decoded_at_the_slot_before():
    """As its manifest says, unless the decoder is asked otherwise; in place without a manifest's word."""
    context, manifest = tuple(range(5, 25)), Manifest("p", "<|mask|>", method="llada", shift=True)
    shifted = replace(CHECKPOINT, manifest=manifest, heads=[])
    logits = both_ways([*context, CHECKPOINT.mask_id]).log_softmax(-1)
    work = ScoreRequest("q", ((context, (30,)), (context, (40,))))
    for checkpoint, asked, slot in (
        (CHECKPOINT, None, -1),
        (CHECKPOINT, True, -2),
        (shifted, None, -2),
        (shifted, False, -1),
    ):
        (score,) = scorer_for(checkpoint, LladaSettings(shift=asked)).score([work])
        assert score.loglikelihoods == pytest.approx([float(logits[slot, 30]), float(logits[slot, 40])], abs=1e-4)
        assert strategy_for(checkpoint, LladaSettings(shift=asked)).shift == (slot == -2)


def test_a_single_sample_does_not_show_its_error():
    work = ScoreRequest("x", ((tuple(range(5, 25)), (30, 41, 52)), (tuple(range(5, 25)), (30,))))
    (score,) = CanvasScorer(CHECKPOINT.backbone, CHECKPOINT.mask_id, 8, samples=1).score([work])
    assert score.errors == (None, 0.0), "one token is exact"


def test_what_exceeds_the_window_is_cut_from_the_left():
    context = tuple(n % 250 for n in range(300))
    scorer = CanvasScorer(CHECKPOINT.backbone, CHECKPOINT.mask_id, 8, samples=4)
    cut, fitting = (next(iter(scorer.score([ScoreRequest("x", ((c, (30, 41)),))]))) for c in (context, context[-254:]))
    assert cut.loglikelihoods == pytest.approx(fitting.loglikelihoods)
    assert (cut.truncated, cut.prompt_tokens) == (46, 256)
    assert (fitting.truncated, fitting.prompt_tokens) == (0, 256)


def test_requests_that_cannot_be_scored_are_refused():
    scorer = CanvasScorer(CHECKPOINT.backbone, CHECKPOINT.mask_id)
    for pair in (((), (1,)), ((1,), ()), ((1,), (2,) * 257)):
        with pytest.raises(ConfigError, match="request x: cannot score"):
            list(scorer.score([ScoreRequest("x", (pair,))]))
