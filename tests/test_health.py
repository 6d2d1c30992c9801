"""Health gates: what they count, when they fail a run, and that they decide nothing else."""

from __future__ import annotations

import pytest

from fluid_eval.cli import EXIT_FAILED, EXIT_OK, EXIT_UNHEALTHY
from fluid_eval.cli.options import exit_code
from fluid_eval.common.spec import HealthSpec, build_spec
from fluid_eval.results.health import KEYS, RULES, gates, judge_again
from fluid_model.common.errors import ConfigError


def record(doc, task="t", **changes):
    """A healthy sample of a task that writes."""
    values = {"finish": "eos", "output": "4", "truncated": 0, "extracted": {"strict": "4", "flex": "4"}}
    return {"key": f"{task}/{doc}", "task": task, **values, **changes}


SICK = {
    "length limit": {"finish": "length"},
    "empty answer": {"output": " \n"},
    "no answer extracted": {"extracted": {"strict": "[invalid]", "flex": "4"}},
    "prompt truncated": {"truncated": 7},
    "numbers not finite": {"broken": True},
    "sandbox time-out": {"verdicts": [{"result": "failed: E"}, {"result": "timed out"}]},
    "thinking never ended": {"thinking_ended": False},
}
WELL = {"sandbox time-out": {"verdicts": [{"result": "failed: E"}]}, "thinking never ended": {"thinking_ended": True}}


def counted(records, thresholds=None, members=None):
    return {gate.gate: gate for gate in gates(records, members or {"t": ["t"]}, thresholds or HealthSpec())}


@pytest.mark.parametrize("name", RULES)
def test_each_gate_counts_its_own_and_no_other(name):
    records = [record(doc, **WELL.get(name, {})) for doc in range(30)]
    assert all(gate.ok and gate.count == 0 for gate in counted(records).values())
    for doc in range(4, 30):
        records[doc] |= SICK[name]
    gates_by_name = counted(records)
    gate = gates_by_name.pop(name)
    assert (gate.count, gate.n, gate.ok, len(gate.keys)) == (26, 30, False, KEYS)
    assert gate.keys[0] == "t/4"
    assert all(other.count == 0 for other in gates_by_name.values())
    setting = {RULES[name].setting: 1.0}
    assert counted(records, HealthSpec(**setting))[name].ok, "1 turns it off"


def test_a_threshold_is_what_may_be_reached():
    records = [record(doc, finish="length" if doc < 2 else "eos") for doc in range(20)]
    assert counted(records, HealthSpec(length_limit=0.1))["length limit"].ok
    assert not counted(records, HealthSpec(length_limit=0.09))["length limit"].ok


def test_gates_ask_only_those_they_can_count():
    likelihood = record(0, "m", finish=None, output="A", extracted={"none": "A"}, truncated=3)
    lost = record(1, "m", finish="length", lost="its worker died", output="", extracted={})
    gates_by_name = counted([likelihood, lost], members={"m": ["m"]})
    assert {name: (gate.count, gate.n) for name, gate in gates_by_name.items()} == {
        "prompt truncated": (1, 1),
        "numbers not finite": (0, 1),
    }
    assert counted([], members={"m": ["m"]}) == {}
    group = [record(0, "a"), record(0, "b", finish="length"), record(0, "c", finish="length")]
    gate = counted(group, members={"g": ["a", "b"]})["length limit"]
    assert (gate.task, gate.count, gate.n, gate.keys) == ("g", 1, 2, ("b/0",))


@pytest.mark.parametrize("nothing", ["", " ", "[invalid]", "[invalidanswer]"])
def test_what_extraction_leaves_where_it_found_nothing(nothing):
    assert counted([record(0, extracted={"none": nothing})])["no answer extracted"].count == 1


def test_other_thresholds_judge_what_was_counted():
    records = [record(doc, finish="length" if doc < 5 else "eos") for doc in range(10)]
    stored = [gate.to_dict() for gate in gates(records, {"t": ["t"]}, HealthSpec())]
    for thresholds in (HealthSpec(), HealthSpec(length_limit=0.5), HealthSpec(length_limit=0.49, no_answer=0.0)):
        assert judge_again(stored, thresholds) == [g.to_dict() for g in gates(records, {"t": ["t"]}, thresholds)]


def test_exit_codes():
    sick, well = [{"ok": True}, {"ok": False}], [{"ok": True}]
    assert (exit_code({}, well), exit_code({}, sick)) == (EXIT_OK, EXIT_UNHEALTHY)
    assert exit_code({"t/0": "its worker died"}, sick) == EXIT_FAILED, "a failed sample is worse than a gate"


def test_thresholds_judge_a_run_and_are_none_of_its_identity():
    base = {"tasks": ["gsm8k"], "model": "m"}
    spec = build_spec({**base, "health": {"length_limit": 0.5}})
    assert (spec.health.length_limit, spec.id) == (0.5, build_spec(base).id)
    assert build_spec(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match=r"health.length_limit=1.5 must lie in \[0, 1\]"):
        build_spec({**base, "health": {"length_limit": 1.5}})
    with pytest.raises(ConfigError, match=r"health.lenght is no setting; known: health.length_limit"):
        build_spec({**base, "health": {"lenght": 1.0}})
