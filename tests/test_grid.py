"""Points of a sweep: all of a grid, some of it, those named; what means nothing to a decoder makes no point."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.sweeps.grid import plan, read_axis
from fluid_model import ConfigError

RUN = {"tasks": "mini", "model": "m", "decoder": {"name": "fluid", "verify": False}}


def sweep(**what):
    return plan({**RUN, "sweep": what})


GAMMA, WIDE = {"decoder.confidence": [0.5, 0.7, 0.9]}, {"decoder.max_horizon": [4, 8]}


def test_a_grid_is_every_combination():
    planned = sweep(grid={**GAMMA, **WIDE})
    settings_of = [(p.spec.decoder.confidence, p.spec.decoder.max_horizon) for p in planned.points]
    assert settings_of == list(itertools.product([0.5, 0.7, 0.9], [4, 8]))
    assert [p.name for p in planned.points][:2] == ["γ=0.5 K=4", "γ=0.5 K=8"]
    assert planned.merged == 0


def test_nested_tables_are_dotted_names():
    """`decoder.confidence = [...]` without quotes is a table to TOML."""
    assert sweep(grid={"decoder": {"confidence": [0.5, 0.7, 0.9]}}) == sweep(grid=GAMMA)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_sample_is_some_points_of_the_grid_each_once(sizes, count, seed):
    names = ["decoder.confidence", "decoder.max_horizon", "decoder.min_horizon", "decoder.slot_budget"]
    values = [[0.1, 0.2, 0.3, 0.4, 0.5], [4, 5, 6, 7, 8], [1, 2, 3, 3, 4], [1, 2, 3, 4, 5]]
    axes = {name: some[:size] for name, some, size in zip(names, values, sizes, strict=False)}
    complete = {p.spec.id for p in sweep(grid=axes).points}
    some = sweep(grid=axes, sample=count, seed=seed)
    assert {p.spec.id for p in some.points} <= complete
    grid = 1
    for size in sizes:
        grid *= size
    assert len(some.points) + some.merged == min(count, grid)
    assert some == sweep(grid=axes, sample=count, seed=seed)


def test_points_named_one_by_one_join_the_grid():
    planned = sweep(grid=GAMMA, point=[{"decoder.name": "ar"}, {"decoder": {"confidence": 0.9}}])
    assert [p.name for p in planned.points] == ["γ=0.5", "γ=0.7", "γ=0.9", "ar"]
    assert planned.merged == 1


def test_settings_of_other_decoders_make_no_points():
    """A grid over decoders and γ has one AR point, and AR no K-head to choose."""
    grid = {"decoder.name": ["ar", "fluid"], "decoder.verify": [False], **GAMMA, "model.tau": [1.0, 2.8]}
    planned = sweep(grid=grid)
    assert [p.name for p in planned.points if p.spec.decoder.name == "ar"] == ["ar"]
    assert len(planned.points) == 1 + 6
    assert planned.merged == 5


def test_the_bases_settings_are_not_another_decoders():
    base = {**RUN, "decoder": {"name": "fluid", "confidence": 0.7}}
    planned = plan({**base, "sweep": {"point": [{"decoder.name": "ar"}, {"decoder.max_horizon": 4}]}})
    assert [p.spec.decoder.name for p in planned.points] == ["ar", "fluid"]
    assert planned.points[1].spec.decoder.confidence == 0.7


def test_names_tell_points_apart():
    planned = sweep(grid={"model.path": ["a/x", "b/x"]})
    assert len({p.name for p in planned.points}) == 2


def test_ids_depend_on_the_points_not_on_their_order():
    assert sweep(grid=GAMMA).id == sweep(grid={"decoder.confidence": [0.9, 0.5, 0.7]}).id
    assert sweep(grid=GAMMA).id != sweep(grid=WIDE).id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decoder.confidence=0.5,1", ("decoder.confidence", [0.5, 1])),
        ("decoder.verify=true,false", ("decoder.verify", [True, False])),
        ("decoder.name=ar, fluid", ("decoder.name", ["ar", "fluid"])),
        ('model.path="a","b c"', ("model.path", ["a", "b c"])),
    ],
)
def test_axes_of_the_command_line(text, expected):
    assert read_axis(text) == expected


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({}, "needs settings to vary"),
        ({"point": [{}]}, "needs settings to vary"),
        ({"grid": {"decoder.confidence": 0.5}}, r"sweep.grid.decoder.confidence=0.5 must be a list of values"),
        ({"grid": {"decoder.confidence": []}}, "must be a list of values"),
        ({"point": -1}, r"sweep.point=-1 must be tables"),
        ({"point": [3]}, r"sweep.point=\[3\] must be tables"),
        ({"grid": {"decoder.confidenz": [1]}}, r"sweep point confidenz=1: decoder.confidenz is no setting"),
        ({"grid": {"decoder.confidence": [0.5, 7]}}, r"sweep point γ=7: .*confidence=7"),
        ({"grids": {}}, r"sweep.grids is no setting; known: sweep.grid"),
        ({"grid": GAMMA, "sample": 0}, "sweep.sample=0 must be at least 1"),
        ({"grid": {"limit": [3, 4]}}, "limit differs between points"),
        ({"grid": {"decoder.max_horizon": list(range(4, 404)), "decoder.confidence": [0.5] * 400}}, "160,000 points"),
    ],
)
def test_what_is_wrong_is_named(what, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**what)


@pytest.mark.parametrize("text", ["decoder.confidence", "=1,2", "a="])
def test_an_axis_without_values_is_refused(text):
    with pytest.raises(ConfigError, match="must read name=value,value"):
        read_axis(text)


def test_settings_without_effect_are_run_once_and_named():
    values = {**RUN, "decoder": "fluid", "sweep": {"grid": {"decoder.confidence": [0.5, 0.7, 0.9]}}}
    planned = plan(values)
    assert [point.name for point in planned.points] == ["as given"]
    assert (planned.merged, planned.idle) == (2, ("decoder.confidence",))
    assert planned.note == (
        "2 points of the grid are the same run as another and run once: "
        "decoder.confidence changes nothing under verification"
    )
    values["sweep"] = {"grid": {"decoder.confidence": [0.5, 0.9], "decoder.verify": [True, False]}}
    assert [point.name for point in plan(values).points] == ["verify", "γ=0.5 no verify", "γ=0.9 no verify"]
    values["sweep"] = {"grid": {"decoder.confidence": [0.5, 0.9], "decoder.rounds": ["reference"]}}
    assert (len(plan(values).points), plan(values).note) == (2, "")
