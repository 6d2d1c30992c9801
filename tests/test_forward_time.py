"""The time of forwards is measured once for a device and model, cached, and its slot budget printed by `doctor`."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.running import forward_time_cache
from fluid_eval.running.worker import load_for
from fluid_model.forward import forward_time
from fluid_model.forward.forward_time import ForwardTime

from .tiny import fluid_checkpoint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda slots, _: 1 + slots / 20, 20),
        (lambda slots, _: max(1.0, slots / 64), 126),
        (lambda slots, _: float(slots), 1),
        (lambda slots, _: 1.0, 128),  # where there is no room for more
    ],
)
def test_measure_by_cost_function(cost, expected):
    assert forward_time.measure(cost, window=1024, most=200).slot_budget == expected


def test_a_burst_of_other_work_does_not_end_a_curve_early():
    """The first time that eight slots are timed, the machine does something else."""
    calls = []

    def seconds(slots, _):
        calls.append(slots)
        return (1 + slots / 20) * (9 if calls.count(8) == 1 and slots == 8 else 1)

    curve = forward_time.measure(seconds, window=1024, most=200)
    assert curve.slot_budget == 20
    assert curve.seconds(8) == pytest.approx(1.4)


@pytest.mark.parametrize("window", [200, 1000, 100_000])
def test_attention_adds_to_every_slot(window):
    """A model of a short window is measured as far as it reaches, one of a very short window nowhere else."""

    def seconds(slots, context):
        assert slots + context <= window
        return 1 + 0.05 * slots + 0.0001 * slots * max(0, context - 128)

    curve = forward_time.measure(seconds, window, most=200)
    added = 0.0 if window == 200 else 0.0001
    assert curve.attention == pytest.approx(added)
    assert curve.seconds(8, 4128) - curve.seconds(8) == pytest.approx(8 * added * 4000)
    assert curve.marginal(8, 4128) == pytest.approx(0.05 + added * 4000)
    assert curve.marginal(8, 3) == curve.marginal(8)
    curve.observe(8, curve.seconds(8, 4128), 4128)
    assert curve.seconds(8) == pytest.approx(1.4), "it is as expected"
    curve.observe(1000, 51.0 + 1000 * added * 4000, 4128)
    assert curve.points[-1] == (1000, pytest.approx(51.0)), "further than was measured, without attention"


def test_a_curve_goes_through_its_points():
    curve = ForwardTime([(1, 2.0), (2, 2.0), (8, 3.0), (16, 7.0)])
    assert [curve.seconds(slots) for slots in (1, 2, 5, 8, 12, 16, 32)] == [2.0, 2.0, 2.5, 3.0, 5.0, 7.0, 15.0]
    assert curve.marginal(1) == pytest.approx(0.0)
    assert curve.marginal(3) == pytest.approx(1 / 6)
    assert curve.marginal(64) == pytest.approx(0.5)
    assert ForwardTime([(4, 1.0)]).seconds(8) == 2.0, "one point alone: in proportion"
    falling = ForwardTime([(1, 2.0), (2, 1.0), (4, 1.5)])
    assert falling.marginal(1.5) == 0
    assert falling.seconds(2) == 2.0, "no forward is faster than one with a single slot"


POINTS = st.dictionaries(st.integers(1, 256), st.floats(0.1, 10.0), min_size=1, max_size=8).map(dict.items).map(sorted)


@given(points=POINTS, slots=st.lists(st.floats(1.0, 600.0), min_size=2, max_size=8).map(sorted))
def test_slots_never_become_cheaper(points, slots):
    """However noisy the points are, one more slot costs at least what one cost before it."""
    curve = ForwardTime(points)
    costs = [curve.marginal(count) for count in slots]
    assert costs[0] >= 0
    assert all(after >= before - 1e-9 for before, after in pairwise(costs))


def test_a_dip_makes_no_slot_free():
    """A device's points, the one of 8 slots too high: slots behind it cost what the curve rises by on the whole."""
    curve = ForwardTime([(1, 14.7), (2, 15.2), (4, 17.5), (8, 21.8), (16, 20.4), (32, 31.8)])
    assert curve.marginal(10) == pytest.approx((20.4 - 14.7) / 15, rel=0.1)
    for _ in range(300):
        curve.observe(16, 30.0)
    assert curve.marginal(10) > 1.2 * (20.4 - 14.7) / 15, "the curve moves with what is observed"


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(2, 1.0), (1, 2.0)], [(1, 1.0), (1, 2.0)], [(1, 0.0)]])
def test_no_curve(points):
    with pytest.raises(ValueError, match="points of a forward's time"):
        ForwardTime(points)


def test_a_curve_follows_a_machine_that_slows_down():
    """All of it where it is not looked at, and the rest where it is."""
    curve = ForwardTime([(1, 1.0), (8, 1.0), (64, 8.0)])
    for _ in range(200):
        curve.observe(8, 4.0)
    assert curve.seconds(8) == pytest.approx(4.0, rel=0.01)
    assert curve.seconds(1) > 1.5
    assert curve.seconds(64) > 8.0
    curve.observe(8, 4000.0)
    assert curve.seconds(8) < 5.0, "a single outlier moves it little"
    curve.observe(128, 60.0)
    assert curve.points[-1] == (128, 60.0), "further than was measured"


def test_a_model_is_measured():
    assert 1 <= fluid_checkpoint().backbone.slot_budget <= 128


def test_it_is_cached_and_printed(tiny_fluid, tmp_path, monkeypatch, capsys, data_dir):
    spec = build_spec({"tasks": "mini", "model": str(tiny_fluid), "decoder": "fluid"})
    first = load_for(spec).backbone.forward_time
    monkeypatch.setattr(forward_time, "measure", lambda *_: pytest.fail("it is known already"))
    assert load_for(spec).backbone.forward_time.points == first.points
    assert main(["doctor", "--data-dir", str(data_dir)]) == 0
    assert f"slot budget {first.slot_budget}: {tiny_fluid.name}" in capsys.readouterr().out
    other = ForwardTime([(1, 1.0), (79, 2.0)])
    negative = '{"m": {"points": [[1, 1]], "attention": -1}}'
    for damaged in ("not json", '{"m": 7}', '{"m": [[1, 2.0]]}', '{"m": {"points": [[1, -1]]}}', negative):
        forward_time_cache.file().write_text(damaged)
        monkeypatch.setattr(forward_time, "measure", lambda *_: other)
        assert load_for(spec).backbone.slot_budget == 77
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert load_for(spec).backbone.slot_budget == 77, "a cache that cannot be written is done without"


@pytest.mark.parametrize(
    "decoder", [{"name": "ar"}, {"name": "fluid", "slot_budget": 5}, {"name": "fluid", "verify": False}]
)
def test_it_is_measured_only_where_a_decoder_asks(tiny_fluid, monkeypatch, decoder):
    monkeypatch.setattr(forward_time, "measure", lambda *_: pytest.fail("not asked"))
    load_for(build_spec({"tasks": "mini", "model": str(tiny_fluid), "decoder": decoder}))
