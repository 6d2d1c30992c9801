"""WeDLM decodes as a plain, slow version of its public engine does, alone or in batches.

That engine itself was run beside the decoder once, with plain torch for its kernels (github.com/Tencent/WeDLM at
0216110f2469): docs/decoders.md says over what, and how many answers were equal.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from bench.field.plain_window import plain_wedlm
from fluid_model import ArSettings, ConfigError, Request, ScoreRequest, WedlmSettings, engine_for, scorer_for

from .test_block_samplers import CHECKPOINTS, NEW, WORK, check, likes_masks
from .test_laws import write

ENDLESS = replace(CHECKPOINTS[0], end_ids=())
WINDOWS = pytest.mark.parametrize("window", [1, 4, 16])


@WINDOWS
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_entropy": 4.0},
        {"max_entropy": 4.5, "distance_penalty": 0.1},
        {"max_entropy": None, "temperature": 0.2},
        {"max_entropy": 4.0, "temperature": 0.7, "top_p": 0.8},
        {"max_entropy": 4.5, "temperature": 1.0, "top_k": 20, "top_p": 0.95},
    ],
)
def test_wedlm_is_the_public_sampler(window, values):
    check(plain_wedlm, WedlmSettings(window=window, **values), CHECKPOINTS[window == 4])


def test_a_predicted_mask_is_text():
    """As in the public engine: it is committed, and not predicted again."""
    decoder, checkpoint = WedlmSettings(window=4, max_entropy=4.5), likes_masks()
    check(plain_wedlm, decoder, checkpoint)
    assert any(checkpoint.mask_id in answer.ids for answer in write(checkpoint, decoder, WORK).values())


@WINDOWS
def test_without_a_bound_every_step_writes_one_token(window):
    for answer in write(ENDLESS, WedlmSettings(window=window, max_entropy=None), WORK).values():
        assert len(set(answer.trace.written)) == len(answer.ids) == NEW
        assert answer.trace.written != sorted(answer.trace.written) or window == 1


@WINDOWS
def test_under_a_bound_that_all_keep_a_step_writes_its_window(window):
    """The prompt's forward writes nothing, and the last one commits what the one before it wrote."""
    for answer in write(ENDLESS, WedlmSettings(window=window, max_entropy=100.0), WORK).values():
        steps = -(-NEW // window) + 1
        assert answer.trace.written == [2 + place // window for place in range(NEW)]
        assert (answer.trace.forwards["prefill"], answer.trace.forwards["denoise"]) == (1, steps)
        assert answer.finish == "length"


def test_a_penalty_above_all_entropies_writes_from_left_to_right():
    for answer in write(ENDLESS, WedlmSettings(distance_penalty=100.0), WORK).values():
        assert answer.trace.written == list(range(2, NEW + 2))


def test_masks_are_fed_behind_tokens_and_tokens_until_they_are_committed():
    seen = []
    engine = engine_for(ENDLESS, WedlmSettings(window=4, max_entropy=None), 1)
    engine.watch = seen.append
    (answer,) = engine.generate(WORK[:1])
    start = len(WORK[0].prompt)
    for step in seen[1:]:
        is_mask = [token == ENDLESS.mask_id for token in step.ids]
        assert is_mask == sorted(is_mask)
        assert sum(is_mask) <= 4
        places = [position - start for position in step.positions]
        assert sorted(places) == list(range(min(places), min(places) + len(places)))
        fed = zip(places, step.ids, strict=True)
        assert all(token in (ENDLESS.mask_id, answer.ids[place]) for place, token in fed if place < NEW)
        assert len(step.tokens) <= sum(not mask for mask in is_mask)
    assert any(step.positions != tuple(sorted(step.positions)) for step in seen)


@pytest.mark.parametrize("room", [NEW, NEW + 3])
def test_no_slot_is_fed_beyond_the_context_window(room):
    """There, steps feed fewer masks, at last none; the answer is as long as asked for."""
    prompt = tuple(range(2, 2 + CHECKPOINTS[0].backbone.window - room))
    for bound in (None, 100.0):
        seen = []
        engine = engine_for(ENDLESS, WedlmSettings(max_entropy=bound), 2)
        engine.watch = seen.append
        answers = {answer.key: answer for answer in engine.generate([Request("long", prompt, NEW), WORK[0]])}
        positions = [place for step in seen if step.key == "long" for place in step.positions]
        assert max(positions) == CHECKPOINTS[0].backbone.window - 1
        assert len(answers["long"].ids) == NEW
        assert answers["long"].trace.forwards["commit"] == 1 or room > NEW
        assert answers["3"].ids == write(ENDLESS, WedlmSettings(max_entropy=bound), WORK[:1])["3"].ids


def test_likelihoods_are_those_of_ar():
    """Causal ones: of tokens alone, in the order of the text."""
    work = [ScoreRequest("x", (((3, 4, 5), (6, 7)), ((3, 4, 5), (8,))))]
    scores = [next(scorer_for(CHECKPOINTS[0], decoder).score(work)) for decoder in (WedlmSettings(), ArSettings())]
    assert scores[0].loglikelihoods == scores[1].loglikelihoods


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "window=0 must lie in [1, 4096]"),
        ({"max_entropy": -0.1}, "max_entropy=-0.1 must lie in [0.0"),
        ({"distance_penalty": -1.0}, "distance_penalty=-1.0 must lie in [0.0"),
        ({"temperature": -1.0}, "temperature=-1.0 must lie in"),
        ({"top_p": 0.0}, "top_p=0.0 must lie in (0.0, 1.0]"),
        ({"top_k": -1}, "top_k=-1 must lie in"),
    ],
)
def test_a_value_out_of_range_is_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        WedlmSettings(**values)
