"""Log-likelihoods: exact, one forward a question, and the figures known for real weights."""

from __future__ import annotations

import pytest
import torch

import fluid_model
from fluid_model import ConfigError, Scorer, ScoreRequest

from .test_laws import calls_of
from .tiny import fluid_checkpoint

CHECKPOINT = fluid_checkpoint()


def plain(model, context, continuation):
    with torch.inference_mode():
        scores = model(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(float(scores[len(context) - 1 + i, t]) for i, t in enumerate(continuation))


def test_scores_are_those_of_a_plain_forward():
    requests = [
        ScoreRequest(str(n), tuple((tuple(range(3, 10 + n)), tail) for tail in ((5,), (6, 7), (8, 9, 10))))
        for n in range(9)
    ]
    for slots in (1, 4, 32):
        scores = {s.key: s for s in Scorer(CHECKPOINT.backbone, slots).score(requests)}
        for request in requests:
            for (context, tail), value in zip(request.pairs, scores[request.key].loglikelihoods, strict=True):
                assert value == pytest.approx(plain(CHECKPOINT.model, context, tail), abs=1e-4)


def test_greedy_means_every_token_is_the_likeliest():
    context = tuple(range(3, 12))
    with torch.inference_mode():
        best = int(CHECKPOINT.model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    request = ScoreRequest("x", ((context, (best,)), (context, (best + 1,))))
    (score,) = Scorer(CHECKPOINT.backbone).score([request])
    assert score.greedy == (True, False)


def test_one_forward_for_all_choices_of_one_token():
    calls = calls_of(CHECKPOINT)
    context = tuple(range(3, 30))
    scorer = Scorer(CHECKPOINT.backbone)
    (score,) = scorer.score([ScoreRequest("x", tuple((context, (t,)) for t in (67, 68, 69, 70)))])
    assert (len(calls), scorer.calls, score.trace.forwards["prefill"]) == (1, 1, 1)


def test_a_choice_that_begins_another_shares_its_forward():
    """Some tokenizers spell " A" in one token and " C" in two."""
    context = tuple(range(3, 30))
    pairs = tuple((context, tail) for tail in ((67,), (9, 68), (9, 69), (67, 9, 70)))
    (score,) = Scorer(CHECKPOINT.backbone).score([ScoreRequest("x", pairs)])
    assert score.trace.forwards["prefill"] == 2  # context + 9 and context + 67 + 9; the context itself comes free
    for (_, tail), value in zip(pairs, score.loglikelihoods, strict=True):
        assert value == pytest.approx(plain(CHECKPOINT.model, context, tail), abs=1e-4)


def test_long_contexts_lose_their_left_and_say_so():
    context = tuple(n % 250 + 3 for n in range(300))
    (score,) = Scorer(CHECKPOINT.backbone).score([ScoreRequest("x", ((context, (5, 6)),))])
    assert score.truncated == 300 + 2 - 1 - 256
    assert score.loglikelihoods[0] == pytest.approx(plain(CHECKPOINT.model, context[-255:], (5, 6)), abs=1e-4)


def test_nothing_to_score_is_refused():
    for pair in (((), (3,)), ((3,), ())):
        with pytest.raises(ConfigError, match="cannot score"):
            list(Scorer(CHECKPOINT.backbone).score([ScoreRequest("x", (pair,))]))


TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def test_known_figures_of_stories260k(stories):
    """Loss and logits from the model's own README, measured there with an independent implementation."""
    checkpoint = fluid_model.load(str(stories))
    ids = tuple(checkpoint.tokenizer.encode(TEXT))
    assert ids[:6] == (1, 403, 407, 261, 378, 432)
    assert len(ids) == 32
    (score,) = Scorer(checkpoint.backbone).score([ScoreRequest("x", ((ids[:1], ids[1:]),))])
    assert -score.loglikelihoods[0] / 31 == pytest.approx(0.18035540, abs=1e-6)
    logits = checkpoint.model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert logits[:6].tolist() == pytest.approx([-4.6575, 8.0599, -4.6587, -4.6574, -4.6575, -4.6581], abs=1e-3)
    assert int(logits.argmax()) == 385


@pytest.mark.slow
def test_known_loss_of_stories260k_on_real_stories(stories, data_dir):
    import gzip
    import json

    checkpoint = fluid_model.load(str(stories))
    with gzip.open(data_dir / "tinystories" / "train_sample.jsonl.gz", "rt") as file:
        texts = [json.loads(next(file))["text"] for _ in range(200)]
    rows = [tuple(ids)[:512] for ids in checkpoint.tokenizer(texts)["input_ids"]]
    requests = [ScoreRequest(str(n), ((ids[:1], ids[1:]),)) for n, ids in enumerate(rows)]
    total = sum(score.loglikelihoods[0] for score in Scorer(checkpoint.backbone).score(requests))
    count = sum(len(ids) - 1 for ids in rows)
    assert count == 79_288
    assert -total / count == pytest.approx(1.48196, abs=1e-5)
