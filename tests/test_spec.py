"""Specs: what is checked, what a name means, and that a spec survives being written down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluid_eval.common.spec import ChatSpec, EngineSpec, ModelSpec, RunSpec, build_spec
from fluid_model import ArSettings, ConfigError, FluidSettings
from fluid_model.common.fields import assign
from fluid_model.common.files import read_toml

BASE = {"tasks": ["gsm8k"], "model": {"path": "m"}}
MAYBE = st.none() | st.integers(1, 10**6)
SPECS = st.builds(
    RunSpec,
    tasks=st.lists(st.sampled_from(["gsm8k", "math500", "mmlu"]), min_size=1, unique=True).map(tuple),
    model=st.builds(
        ModelSpec, path=st.text(min_size=1), dtype=st.sampled_from(["auto", "float32"]), tau=st.none() | st.floats(0, 9)
    ),
    decoder=st.builds(ArSettings, temperature=st.floats(0, 5), top_p=st.floats(0.1, 1))
    | st.builds(FluidSettings, confidence=st.floats(0, 1), verify=st.booleans()),
    chat=st.none()
    | st.builds(
        ChatSpec,
        system=st.none() | st.text(),
        thinking=st.booleans(),
        suffix=st.text(),
        variables=st.dictionaries(st.text("abc", min_size=1), st.booleans() | st.text()),
    ),
    engine=st.builds(EngineSpec, kind=st.just("ray"), workers=MAYBE),
    limit=MAYBE,
    num_fewshot=MAYBE,
    batch_size=st.just("auto") | st.integers(1, 99),
    seed=st.integers(0, 2**31),
    allow_unsafe_code=st.booleans(),
)


@given(SPECS)
def test_written_down_and_read_again_is_the_same_spec(spec):
    again = build_spec(spec.to_dict())
    assert again == spec
    assert again.id == spec.id


def test_the_id_is_what_decides_the_answers():
    spec = build_spec(BASE)
    same = {**BASE, "batch_size": 3, "engine": {"kind": "ray", "workers": 2}, "data_dir": "elsewhere"}
    assert build_spec(same).id == spec.id
    for change in ({"seed": 1}, {"limit": 3}, {"decoder": "fluid"}, {"tasks": ["mmlu"]}, {"max_new_tokens": 5}):
        assert build_spec({**BASE, **change}).id != spec.id


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "tasks is missing: pass --tasks"),
        ({"tasks": ["gsm8k"]}, "model is missing: pass --model"),
        ({**BASE, "limit": -1}, "limit=-1 must be at least 1"),
        ({**BASE, "limit": 0}, "limit=0 must be at least 1"),
        ({**BASE, "num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        ({**BASE, "limit": "many"}, "limit='many' must be a whole number or nothing"),
        ({**BASE, "limit": True}, "limit=True must be a whole number"),
        ({**BASE, "batch_size": "big"}, "batch_size='big' must be a whole number or 'auto'"),
        ({**BASE, "colour": 1}, "colour is no setting; known: tasks, model, decoder"),
        (
            {**BASE, "decoder": "other"},
            "decoder='other' is unknown; known: ar, fluid, nbdiff, llada, mdlm, dream",
        ),
        ({**BASE, "decoder": {"gamma": 1}}, "decoder.gamma is no setting of decoder 'ar'; known: decoder.temperature"),
        (
            {**BASE, "decoder": {"name": "fluid", "guidance": 1}},
            "decoder.guidance is no setting of decoder 'fluid'",
        ),
        ({**BASE, "decoder": {"name": "fluid", "confidence": 1.5}}, "confidence=1.5 must lie in"),
        (
            {**BASE, "decoder": {"name": "fluid", "min_horizon": 9, "max_horizon": 8}},
            "min_horizon=9 must lie in 1..max_horizon=8",
        ),
        (
            {**BASE, "decoder": {"name": "fluid", "rounds": "two"}},
            "decoder.rounds='two' is unknown; known: one, reference",
        ),
        (
            {**BASE, "decoder": {"name": "fluid", "rounds": "reference", "temperature": 1.0}},
            "temperature=1.0: rounds=reference is greedy; use rounds=one",
        ),
        ({**BASE, "decoder": {"name": "fluid", "slot_budget": 0}}, "slot_budget=0 must lie in"),
        ({**BASE, "decoder": {"name": "fluid", "verify": 1}}, "decoder.verify=1 must be true or false"),
        (
            {**BASE, "model": {"path": "m", "dtype": "int4"}},
            "model.dtype='int4' is unknown; did you mean int8?",
        ),
        ({**BASE, "tasks": "gsm8k,gsm8k"}, "must name at least one task, each once"),
        ({**BASE, "tasks": ""}, "must name at least one task"),
        ({**BASE, "engine": {"workers": 2}}, "engine.workers=2: the inline engine has one; use --engine ray"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError) as caught:
        build_spec(values)
    assert message in str(caught.value)


def test_settings_on_the_command_line():
    values: dict = {}
    for setting in ("a.b=0.5", "a.c=true", "a.d=fluid", 'a.e="x=y"', "f=[1, 2]", "g=a=b"):
        assign(values, setting)
    assert values == {"a": {"b": 0.5, "c": True, "d": "fluid", "e": "x=y"}, "f": [1, 2], "g": "a=b"}
    for wrong in ("novalue", "=3"):
        with pytest.raises(ConfigError, match="must read name=value"):
            assign({}, wrong)
    with pytest.raises(ConfigError, match="a is a value, not a table"):
        assign({"a": 1}, "a.b=2")


def test_files(tmp_path):
    file = tmp_path / "spec.toml"
    file.write_text('tasks = ["gsm8k"]\n[model]\npath = "m"\n[decoder]\nname = "fluid"\nconfidence = 0.5\n')
    assert build_spec(read_toml(file)).decoder == FluidSettings(confidence=0.5)
    file.write_text("tasks = [")
    with pytest.raises(ConfigError, match=r"spec\.toml: not TOML"):
        read_toml(file)
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")
