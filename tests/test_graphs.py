"""Captured forwards: padded to buckets, kept between calls, compared with plain ones. A CPU runs the call again."""

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
    """Its replays differ from the captured forward."""

    def _record(self, run, device):
        hidden = run()
        return hidden, lambda: hidden.copy_(run() + 0.1)


@pytest.fixture
def checkpoint():
    return fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")


def requests(checkpoint, new=16):
    texts = [*TEXTS, *(TEXTS[0][:n] for n in (30, 45, 60))]
    return [Request(text, tuple(checkpoint.tokenizer(text)["input_ids"]), new) for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [ArSettings(), FluidSettings(slot_budget=64), FluidSettings(verify=False)])
@pytest.mark.parametrize("slots", [1, 5])
def test_replayed_forwards_agree_with_plain_ones(checkpoint, decoder, slots):
    work = requests(checkpoint, 10)
    plain = {g.key: (g.ids, g.trace) for g in engine_for(checkpoint, decoder, slots).generate(work)}
    checkpoint.backbone.graphs = captured = cuda_graphs.Graphs(checkpoint.backbone.explicit)
    engine = engine_for(checkpoint, decoder, slots)
    assert {g.key: (g.ids, g.trace) for g in engine.generate(work)} == plain
    shapes = captured.captured
    assert shapes
    assert all(
        rows in cuda_graphs.ROWS and fed in cuda_graphs.SLOTS and n % cuda_graphs.COLUMNS == 0
        for rows, fed, n in shapes
    )
    assert len(shapes) < engine.calls
    assert {g.key: (g.ids, g.trace) for g in engine.generate(work)} == plain
    assert captured.captured == shapes, "the cache and what was captured over it are kept"


def test_a_longer_answer_takes_another_cache(checkpoint):
    checkpoint.backbone.graphs = captured = cuda_graphs.Graphs(checkpoint.backbone.explicit)
    engine = engine_for(checkpoint, ArSettings(), 2)
    list(engine.generate(requests(checkpoint)))
    assert {columns for _, _, columns in captured.captured} == {256}
    (longer,) = engine.generate(requests(checkpoint, 400)[:1])
    assert len(longer.ids) < 400
    (alone,) = engine_for(fluid_model.load(str(resource("checkpoints") / "tiny-fluid")), ArSettings(), 1).generate(
        requests(checkpoint, 400)[:1]
    )
    assert longer.ids == alone.ids


def test_a_replay_that_differs_is_an_error(checkpoint):
    checkpoint.backbone.graphs = Wrong(checkpoint.backbone.explicit)
    with pytest.raises(RunError, match="differs by"):
        list(engine_for(checkpoint, ArSettings(), 2).generate(requests(checkpoint)))


def test_non_finite_rows_break_no_capture():
    """NaN counts as equal to NaN. The first call returns a replay, as all later ones do."""
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
    assert (hidden[1:] == 4).all(), "from the replay of four rows, not the plain forward of three"


def test_forwards_larger_than_all_buckets_run_plain(checkpoint, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "SLOTS", (1, 2))
    checkpoint.backbone.graphs = captured = cuda_graphs.Graphs(checkpoint.backbone.explicit)
    decoder = FluidSettings(slot_budget=64)
    captured_ids = [g.ids for g in engine_for(checkpoint, decoder, 1).generate(requests(checkpoint))]
    assert all(fed <= 2 for _, fed, _ in captured.captured)
    checkpoint.backbone.graphs = None
    assert captured_ids == [g.ids for g in engine_for(checkpoint, decoder, 1).generate(requests(checkpoint))]


def logged(checkpoint, decoder, slots, work):
    """Every answer's ids, and the largest logit of each slot that held a token, to the last bit."""
    largest: dict[tuple[str, int], float] = {}
    engine = engine_for(checkpoint, decoder, slots)
    forward = checkpoint.backbone.forward

    def log(ids, plan, cache):
        hidden = forward(ids, plan, cache)
        best = checkpoint.backbone.logits(hidden).amax(-1)
        start, rows = cache.write_columns[0], engine._rows
        for row, (positions, values) in enumerate(zip(plan.positions.tolist(), best.tolist(), strict=True)):
            answers = start + row < len(rows) and rows.lengths[start + row] > 0  # else a prompt is read
            if answers and (plan.intervals is None or int(plan.intervals.steps[row, 0]) == 0):
                largest[rows.requests[start + row].key, positions[0]] = values[0]
        return hidden

    checkpoint.backbone.forward = log
    try:
        answers = {g.key: g.ids for g in engine.generate(work)}
    finally:
        del checkpoint.backbone.forward
    return answers, largest


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoder", [ArSettings(), FluidSettings(verify=False)])
def test_one_shape_makes_numbers_independent_of_the_batch(dtype, decoder):
    """A token's logits are the same in every batch, to the last bit."""
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype=dtype)
    work = requests(checkpoint, 6)[1:5]
    checkpoint.backbone.capture(on=True, only=(4, 32, 128))
    answers, numbers = logged(checkpoint, decoder, 1, work)
    again, others = logged(checkpoint, decoder, 3, work)  # three together, then one alone
    assert again == answers
    shared = numbers.keys() & others.keys()
    assert len(shared) > 12
    assert all(others[place] == numbers[place] for place in shared)


def test_without_one_shape_numbers_depend_on_the_batch(checkpoint):
    """Or the law above would prove nothing."""
    checkpoint.backbone.compiled = None  # which needs no shape for that
    _, alone = logged(checkpoint, ArSettings(), 1, requests(checkpoint, 10))
    _, others = logged(checkpoint, ArSettings(), 5, requests(checkpoint, 10))
    assert any(others[place] != alone[place] for place in alone.keys() & others.keys())


def test_a_shape_that_is_too_small_is_refused(checkpoint):
    checkpoint.backbone.capture(on=True, only=(2, 16, 64))
    with pytest.raises(ConfigError, match="more than one shape"):
        list(engine_for(checkpoint, ArSettings(), 2).generate(requests(checkpoint)))


def test_only_the_explicit_forward_can_be_captured(checkpoint):
    checkpoint.backbone.capture(on=True)
    assert checkpoint.backbone.forward_choice == ("captured", "asked for")
    checkpoint.backbone.capture(on=False)
    checkpoint.backbone.explicit = None
    with pytest.raises(ConfigError, match="only the explicit Llama forward can be captured"):
        checkpoint.backbone.capture(on=True)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", [ArSettings(), FluidSettings(slot_budget=64)])
def test_cuda_replays_agree_with_plain_forwards(decoder):
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cuda", dtype="float32")
    plain = {g.key: g.ids for g in engine_for(checkpoint, decoder, 3).generate(requests(checkpoint))}
    checkpoint.backbone.capture(on=True)
    assert {g.key: g.ids for g in engine_for(checkpoint, decoder, 3).generate(requests(checkpoint))} == plain
    assert checkpoint.backbone.graphs.captured
    torch.cuda.synchronize()
