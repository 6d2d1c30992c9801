"""What prompts begin with in common is read once, and answers are those of prompts read whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.running.chunks import split_by_prefix
from fluid_model import ArSettings, FluidSettings, Request, Scorer, ScoreRequest, WedlmSettings, engine_for
from fluid_model.engine.shared_prefixes import MIN_PREFIX, common_prefix, group

from .test_laws import calls_of
from .tiny import fluid_checkpoint

SHOTS = tuple(n % 250 for n in range(3, 83))
OTHER = tuple(n % 250 for n in range(100, 160))


@settings(max_examples=200, deadline=None)
@given(
    ends=st.lists(
        st.tuples(st.sampled_from([(), SHOTS, OTHER, SHOTS[:40]]), st.lists(st.integers(0, 3), max_size=5)), max_size=20
    ),
    own=st.lists(st.integers(1, 3), min_size=20, max_size=20),
)
def test_groups_by_brute_force(ends, own):
    """Each prompt is in one group, all of a group begin alike, and each keeps what is its own."""
    prompts = [(*beginning, *end, 0, 0, 0) for beginning, end in ends]
    groups = group(prompts, own[: len(prompts)])
    assert sorted(place for each in groups for place in each.members) == list(range(len(prompts)))
    lengths = [[len(prompts[place]) for place in each.members] for each in groups]
    assert all(in_group == sorted(in_group, reverse=True) for in_group in lengths)
    assert [in_group[0] for in_group in lengths] == sorted((in_group[0] for in_group in lengths), reverse=True)
    for each in groups:
        begin = {prompts[place][: each.length] for place in each.members}
        assert len(begin) == 1
        assert each.length == 0 or (each.length >= MIN_PREFIX and len(each.members) > 1)
        assert all(len(prompts[place]) - each.length >= own[place] for place in each.members)


def test_common():
    assert [common_prefix("abc", other) for other in ("abd", "x", "abcd", "abc", "")] == [2, 0, 3, 3, 0]


def work() -> list[Request]:
    """Two sets of shots with questions of different length, and one prompt of its own."""
    prompts = [SHOTS + (n + 20,) + (7, 9) * (n % 4 + 1) for n in range(6)]
    prompts += [OTHER + (n + 30,) * (n + 1) for n in range(3)] + [(5, 6, 7, 8)]
    return [Request(str(n), prompt, 24, seed=n) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "decoder",
    [
        ArSettings(),
        FluidSettings(slot_budget=64),
        FluidSettings(temperature=0.7, slot_budget=64),
        FluidSettings(verify=False, confidence=0.2),
        FluidSettings(rounds="reference"),
        WedlmSettings(window=8, max_entropy=4.5),
    ],
)
@pytest.mark.parametrize("slots", [1, 4, 10])
def test_answers_are_those_of_prompts_read_whole(decoder, slots):
    checkpoint = fluid_checkpoint()
    alone = {
        request.key: answer for request in work() for answer in engine_for(checkpoint, decoder, 1).generate([request])
    }
    engine = engine_for(checkpoint, decoder, slots)
    seen = calls_of(checkpoint)
    answers = {answer.key: answer for answer in engine.generate(work())}
    assert {key: answer.ids for key, answer in answers.items()} == {key: answer.ids for key, answer in alone.items()}
    assert engine.calls == len(seen)
    assert {key: a.trace.slots for key, a in answers.items() if not drafts(decoder)} == {
        key: a.trace.slots for key, a in alone.items() if not drafts(decoder)
    }, "a row's account does not depend on who shares its beginning"
    assert all(answer.trace.forwards["prefill"] == 1 for answer in answers.values())


def drafts(decoder) -> bool:
    """Whether what a row feeds depends on how many rows there are."""
    return isinstance(decoder, FluidSettings) and decoder.rounds == "one" and decoder.verify


@pytest.mark.parametrize("slots", [1, 4, 10])
def test_shots_are_read_once(slots, monkeypatch):
    checkpoint = fluid_checkpoint()
    fed: list[int] = []
    real = checkpoint.backbone.forward

    def watched(ids, *rest):
        fed.append(ids.shape[1])
        return real(ids, *rest)

    monkeypatch.setattr(checkpoint.backbone, "forward", watched)
    list(engine_for(checkpoint, ArSettings(), slots).generate(work()))
    assert sorted(fed)[-2:] == [len(OTHER), len(SHOTS)]
    assert sorted(fed)[-3] < MIN_PREFIX


def test_every_forward_of_a_row_is_told():
    checkpoint = fluid_checkpoint()
    engine, steps = engine_for(checkpoint, ArSettings(), 4), []
    engine.watch = steps.append
    answers = list(engine.generate(work()))
    assert len(steps) == sum(sum(answer.trace.forwards.values()) for answer in answers)
    for answer in answers:
        reported = [token for step in steps if step.key == answer.key for token in step.tokens]
        assert tuple(reported[: len(answer.ids)]) == answer.ids


@pytest.mark.parametrize("slots", [1, 2, 16])
def test_scores_are_those_of_contexts_read_whole(slots):
    """Shots once a set; a question's choices in one forward as before."""
    checkpoint = fluid_checkpoint()
    contexts = [request.prompt for request in work()]
    choices = [((30,), (40,), (50, 51)), ((60,),)]
    asked = [
        ScoreRequest(str(n), tuple((context, choice) for choice in choices[n % 2]))
        for n, context in enumerate(contexts)
    ]
    alone = {request.key: score for request in asked for score in Scorer(checkpoint.backbone).score([request])}
    scorer, seen = Scorer(checkpoint.backbone, slots), calls_of(checkpoint)
    scores = {score.key: score for score in scorer.score(asked)}
    assert scorer.calls == len(seen)
    for key, score in alone.items():
        assert scores[key].loglikelihoods == pytest.approx(score.loglikelihoods, abs=1e-4)
        assert (scores[key].greedy, scores[key].prompt_tokens) == (score.greedy, score.prompt_tokens)
        assert scores[key].trace == score.trace
    assert scorer.calls <= 2 + len(asked), "shots once a set, then every question at most once"


def test_a_context_asked_twice_shares_all_but_what_is_looked_at():
    checkpoint = fluid_checkpoint()
    pairs = tuple((SHOTS, choice) for choice in ((30,), (40,), (50, 51)))
    (alone,) = Scorer(checkpoint.backbone).score([ScoreRequest("x", pairs)])
    twice = list(Scorer(checkpoint.backbone).score([ScoreRequest(key, pairs) for key in "ab"]))
    assert all(score.loglikelihoods == pytest.approx(alone.loglikelihoods, abs=1e-4) for score in twice)


def test_workers_get_what_begins_alike_together():
    asked = [*work(), ScoreRequest("s", (((*SHOTS, 99), (1,)),))]
    chunks = split_by_prefix(asked, 4)
    assert sorted(item.key for chunk in chunks for item in chunk) == sorted(item.key for item in asked)
    assert max(map(len, chunks)) == 4
    sets = [{"s" if item.key == "s" else int(item.key) // 6 if item.key != "9" else "9" for item in c} for c in chunks]
    assert sets == [{0}, {0, "s"}, {1}, {"9"}]
