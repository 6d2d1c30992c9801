"""Captured forwards: what is filled up, kept and compared. On a CPU a replay runs the call again."""

from __future__ import annotations

import pytest
import torch

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, Request
from fluid_model.common.errors import ConfigError, RunError
from fluid_model.decoders import engine_for
from fluid_model.forward import cuda_graphs

from .test_rounds import TEXTS


class Wrong(cuda_graphs.Graphs):
    """Whose replays do not say what was captured."""

    def _record(self, run, device):
        hidden = run()
        return hidden, lambda: hidden.copy_(run() + 0.1)


@pytest.fixture
def checkpoint():
    return fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")


def requests(checkpoint, new=16):
    texts = [*TEXTS, *(TEXTS[0][:n] for n in (30, 45, 60))]
    return [Request(text, tuple(checkpoint.tokenizer(text)["input_ids"]), new) for text in texts]


@pytest.mark.parametrize("decoder", [ArSettings(), FluidSettings(slot_budget=64), FluidSettings(verify=False)])
@pytest.mark.parametrize("slots", [1, 3, 5])
def test_replayed_forwards_say_what_plain_ones_say(checkpoint, decoder, slots):
    plain = {g.key: (g.ids, g.trace) for g in engine_for(checkpoint, decoder, slots).generate(requests(checkpoint))}
    checkpoint.backbone.graphs = captured = cuda_graphs.Graphs(checkpoint.backbone.written_out)
    engine = engine_for(checkpoint, decoder, slots)
    assert {g.key: (g.ids, g.trace) for g in engine.generate(requests(checkpoint))} == plain
    shapes = captured.captured
    assert shapes
    assert all(
        rows in cuda_graphs.ROWS and fed in cuda_graphs.SLOTS and n % cuda_graphs.COLUMNS == 0
        for rows, fed, n in shapes
    )
    assert len(shapes) < engine.calls
    assert {g.key: (g.ids, g.trace) for g in engine.generate(requests(checkpoint))} == plain
    assert captured.captured == shapes, "the cache and what was captured over it are kept"


def test_a_longer_answer_takes_another_cache(checkpoint):
    checkpoint.backbone.graphs = captured = cuda_graphs.Graphs(checkpoint.backbone.written_out)
    engine = engine_for(checkpoint, ArSettings(), 2)
    list(engine.generate(requests(checkpoint)))
    assert {columns for _, _, columns in captured.captured} == {256}
    (answer,) = engine.generate(requests(checkpoint, 400)[:1])
    assert len(answer.ids) < 400
    (alone,) = engine_for(fluid_model.load(str(resource("checkpoints") / "tiny-fluid")), ArSettings(), 1).generate(
        requests(checkpoint, 400)[:1]
    )
    assert answer.ids == alone.ids


def test_a_replay_that_differs_is_told(checkpoint):
    checkpoint.backbone.graphs = Wrong(checkpoint.backbone.written_out)
    with pytest.raises(RunError, match="differs by"):
        list(engine_for(checkpoint, ArSettings(), 2).generate(requests(checkpoint)))


def test_a_broken_row_breaks_no_capture():
    """Not a number is not a difference; and the first forward is a replay already, as all that follow are."""
    calls = []

    def forward(ids, positions, mask, cache):
        calls.append(tuple(ids.shape))
        hidden = torch.full((*ids.shape, 4), float(len(ids)))
        hidden[0] = float("nan")
        return hidden

    captured = cuda_graphs.Graphs(forward)
    cache = captured.cache(3, 20)
    cache.set_write_positions(0, [5, 5, 5], 1, torch.device("cpu"))
    ids, mask = torch.ones(3, 1, dtype=torch.long), torch.zeros(3, 1, 1, 6)
    captured._check = lambda key, replayed, plain: cuda_graphs.Graphs._check(captured, key, replayed, plain.add(1))
    hidden = captured(ids, ids, mask, cache)
    assert calls == [(3, 1), (4, 1), (4, 1)]
    assert hidden[0].isnan().all()
    assert (hidden[1:] == 4).all(), "what four rows say, not three"


def test_what_is_larger_than_all_buckets_runs_as_it_is(checkpoint, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "SLOTS", (1, 2))
    checkpoint.backbone.graphs = captured = cuda_graphs.Graphs(checkpoint.backbone.written_out)
    decoder = FluidSettings(slot_budget=64)
    answers = [g.ids for g in engine_for(checkpoint, decoder, 1).generate(requests(checkpoint))]
    assert all(fed <= 2 for _, fed, _ in captured.captured)
    checkpoint.backbone.graphs = None
    assert answers == [g.ids for g in engine_for(checkpoint, decoder, 1).generate(requests(checkpoint))]


def answers_and_logits(checkpoint, decoder, slots, work=None):
    """Every answer's ids, and the likeliest logit of each of its slots that came to be tokens, to the last bit."""
    logits: dict[tuple[str, int], float] = {}
    engine = engine_for(checkpoint, decoder, slots)
    forward = checkpoint.backbone.forward

    def listen(ids, reading, cache):
        hidden = forward(ids, reading, cache)
        best = checkpoint.backbone.logits(hidden).amax(-1)
        start = cache.write_columns[0]
        for row, (places, largest) in enumerate(zip(reading.positions.tolist(), best.tolist(), strict=True)):
            rows = engine._rows[start + row :] if start + row < len(engine._rows) else []
            if (rows and reading.intervals is None) or (rows and int(reading.intervals.steps[row, 0]) == 0):
                logits[rows[0].request.key, places[0]] = largest[0]
        return hidden

    checkpoint.backbone.forward = listen
    try:
        answers = {g.key: g.ids for g in engine.generate(work or requests(checkpoint, 10))}
    finally:
        del checkpoint.backbone.forward
    return answers, logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoder", [ArSettings(), FluidSettings(verify=False)])
def test_one_shape_makes_numbers_independent_of_the_batch(dtype, decoder):
    """What a token's logits are alone, they are in every batch, to the last bit; without, they are not."""
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype=dtype)
    work = requests(checkpoint, 6)[1:5]
    checkpoint.backbone.capture(on=True, only=(4, 32, 128))
    answers, numbers = answers_and_logits(checkpoint, decoder, 1, work)
    for slots in (2, 4):
        again, others = answers_and_logits(checkpoint, decoder, slots, work)
        assert again == answers
        shared = numbers.keys() & others.keys()
        assert len(shared) > 12
        assert all(others[place] == numbers[place] for place in shared)
    checkpoint.backbone.capture(on=False)
    checkpoint.backbone.native = None  # which needs no shape for that
    _, alone = answers_and_logits(checkpoint, ArSettings(), 1)
    _, others = answers_and_logits(checkpoint, ArSettings(), 5)
    assert any(others[place] != alone[place] for place in alone.keys() & others.keys())


def test_a_shape_that_is_too_small_is_refused(checkpoint):
    checkpoint.backbone.capture(on=True, only=(2, 16, 64))
    with pytest.raises(ConfigError, match="more than one shape"):
        list(engine_for(checkpoint, ArSettings(), 2).generate(requests(checkpoint)))


def test_only_what_is_written_out_can_be_captured(checkpoint):
    checkpoint.backbone.written_out = None
    with pytest.raises(ConfigError, match="written out"):
        checkpoint.backbone.capture(on=True)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", [ArSettings(), FluidSettings(slot_budget=64)])
def test_cuda_replays_say_what_plain_forwards_say(decoder):
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cuda", dtype="float32")
    plain = {g.key: g.ids for g in engine_for(checkpoint, decoder, 3).generate(requests(checkpoint))}
    checkpoint.backbone.capture(on=True)
    assert {g.key: g.ids for g in engine_for(checkpoint, decoder, 3).generate(requests(checkpoint))} == plain
    assert checkpoint.backbone.graphs.captured
    torch.cuda.synchronize()
