"""The slot budget is measured once for a device and model, cached, and printed by `doctor`."""

from __future__ import annotations

import pytest

from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.running import slot_budget_cache
from fluid_eval.running.worker import load_for
from fluid_model.forward import slot_budget

from .tiny import fluid_checkpoint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (lambda slots: 1 + slots / 20, 20),
        (lambda slots: max(1.0, slots / 64), 126),
        (lambda slots: float(slots), 1),
        (lambda slots: 1.0, 128),  # where there is no room for more
    ],
)
def test_measure_by_cost_function(cost, expected):
    assert slot_budget.measure(cost, most=200) == expected


def test_a_model_is_measured():
    assert 1 <= fluid_checkpoint().backbone.slot_budget <= 128


def test_it_is_cached_and_printed(tiny_fluid, tmp_path, monkeypatch, capsys, data_dir):
    spec = build_spec({"tasks": "mini", "model": str(tiny_fluid), "decoder": "fluid"})
    first = load_for(spec).backbone.slot_budget
    monkeypatch.setattr(slot_budget, "measure", lambda *_: pytest.fail("it is known already"))
    assert load_for(spec).backbone.slot_budget == first
    assert main(["doctor", "--data-dir", str(data_dir)]) == 0
    assert f"slot budget {first}: {tiny_fluid.name}" in capsys.readouterr().out
    slot_budget_cache.file().write_text("not json")
    monkeypatch.setattr(slot_budget, "measure", lambda *_: 77)
    assert load_for(spec).backbone.slot_budget == 77
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert load_for(spec).backbone.slot_budget == 77, "a cache that cannot be written is done without"


@pytest.mark.parametrize(
    "decoder", [{"name": "ar"}, {"name": "fluid", "slot_budget": 5}, {"name": "fluid", "verify": False}]
)
def test_it_is_measured_only_where_a_decoder_asks(tiny_fluid, monkeypatch, decoder):
    monkeypatch.setattr(slot_budget, "measure", lambda *_: pytest.fail("not asked"))
    load_for(build_spec({"tasks": "mini", "model": str(tiny_fluid), "decoder": decoder}))
