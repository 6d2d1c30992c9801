"""Conditions under which a run's tokens/forward and tokens/s hold, and whether two runs share them. No torch.

FLUID with verification in one forward a step drafts by marginal cost: a slot is fed only where its expected gain
exceeds it. Its tokens/forward therefore depend on the rows that share a forward, and on the slot budget or, where none
is set, on measured time, which no two runs share. Other decoders' do not. Tokens/s depend on the machine too. A
condition that was not recorded is unknown, and equal to no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluid_model.common.files import Nested
from fluid_model.registry import stored_decoder

UNKNOWN = "not recorded"
MACHINE_FIELDS = ("device", "dtype", "threads", "workers", "forward", "processor", "cpus")
WHERE_RECORDED = ("forward_kind",)
"""Of the machine, too, but not of runs recorded before it was: compared only where both runs have it."""
DRAFTING_FIELDS = ("slot_budget", "rows", "forward")


def describe(environment: Mapping[str, Any], spec: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Nested:
    """A run's conditions, as stored in its result; None for a condition that was not recorded.

    slot_budget, rows: values that the draft policy used, each once, over all answers; None where drafts do not depend
    on them. Several values: the run was resumed under others, or memory ran out.
    drafts_by_time: whether drafts followed measured time, for any answer.  plain_share: steps without drafts, as these
    did not pay, over all steps of such answers; None without any.
    forward: compiled or torch.  batch_size: as asked.  sessions: processes that answered.
    """
    engine = environment.get("engine", {})
    generated = [record for record in records if record.get("output_ids")]
    conditions: Nested = {
        "drafts_by_cost": drafts_by_cost(spec),
        **_by_time(generated),
        "forward": engine.get("forward"),
        "batch_size": spec.get("batch_size"),
        "sessions": environment.get("sessions"),
    }
    for name in ("slot_budget", "rows"):
        values = [record.get("draft_policy", {}).get(name) for record in generated]
        known = bool(values) and None not in values
        conditions[name] = sorted(set(values)) if known and conditions["drafts_by_cost"] else None
    return conditions


def _by_time(generated: Sequence[Mapping[str, Any]]) -> Nested:
    by_time = [record["trace"]["forwards"] for record in generated if "drafts" in record.get("draft_policy", {})]
    plain = sum(forwards.get("commit", 0) for forwards in by_time)
    steps = plain + sum(forwards.get("round", 0) for forwards in by_time)
    return {"drafts_by_time": bool(by_time), "plain_share": plain / steps if steps else None}


def drafts_by_cost(spec: Mapping[str, Any]) -> bool:
    """Whether a run's decoder drafts by marginal cost, as FLUID does with verification, in one forward a step."""
    decoder = stored_decoder(spec.get("decoder") or {})
    return decoder is not None and decoder.drafts_by_cost


def unequal_forwards(base: Nested, other: Nested) -> list[str]:
    """Reasons why tokens/forward of two runs differ by more than their decoders. Empty if there are none.

    Two runs that draft by cost need equal budgets and rows. If one of the two does, both need the same forward. Drafts
    that follow measured time are equal to none.
    """
    drafting_runs = [run for run in (base, other) if run["drafts_by_cost"]]
    if not drafting_runs:
        return []
    by_time = len(drafting_runs) == 2 and any(run.get("drafts_by_time") for run in drafting_runs)
    reasons = ["drafts follow measured time unless decoder.slot_budget is set"] if by_time else []
    # 1) between the runs
    names = DRAFTING_FIELDS[by_time:] if len(drafting_runs) == 2 else ("forward",)
    for name in names:
        ours, theirs = base[name], other[name]
        if ours is None or theirs is None:
            reasons.append(f"{_words(name)}: {UNKNOWN}")
        elif ours != theirs:
            reasons.append(f"{_words(name)}: {_value(ours)} / {_value(theirs)}")
    # 2) within each
    for which, run in (("the base", base), ("the other", other)):
        mixed = [_words(name) for name in ("slot_budget", "rows") if len(run[name] or ()) > 1]
        if run["drafts_by_cost"] and mixed:
            reasons.append(f"{' and '.join(mixed)} changed while {which} ran")
    return reasons


def drafting(run: Nested) -> str | None:
    """Slot budget and rows of a run that drafts by cost, for printing beside its tokens/forward; None for others."""
    if not run["drafts_by_cost"]:
        return None
    if not run.get("drafts_by_time"):
        return ", ".join(f"{_words(name)} {_value(run[name])}" for name in ("slot_budget", "rows"))
    plain = run.get("plain_share") or 0.0
    return f"measured time ({100 * plain:.0f}% of steps without drafts), {_words('rows')} {_value(run['rows'])}"


def unequal_seconds(base: Nested, other: Nested) -> list[str]:
    """Differences between two runs' machines that make their tokens/s incomparable. Empty if there are none.

    base, other: see `machine`.
    """
    if base.get("backend") or other.get("backend"):  # then the program that decodes is what is compared
        fields = tuple(name for name in MACHINE_FIELDS if name != "forward")
        unknown = [name for name in fields if base[name] is None or other[name] is None]
        if unknown:
            return [f"{', '.join(unknown)}: {UNKNOWN}"]
        return [f"{name}: {base[name]} / {other[name]}" for name in fields if base[name] != other[name]]
    unknown = [name for name in MACHINE_FIELDS if base[name] is None or other[name] is None]
    if unknown:
        return [f"{', '.join(unknown)}: {UNKNOWN}"]
    both = [name for name in WHERE_RECORDED if base.get(name) is not None and other.get(name) is not None]
    names = (*MACHINE_FIELDS, *(both if base["forward"] == other["forward"] else ()), "batch_size")
    return [f"{name}: {base[name]} / {other[name]}" for name in names if base[name] != other[name]]


def machine(environment: Mapping[str, Any], spec: Mapping[str, Any]) -> Nested:
    """Device, dtype, threads and the rest that a run's seconds depend on."""
    where = {**environment, **environment.get("engine", {})}
    return {
        **{name: where.get(name) for name in (*MACHINE_FIELDS, *WHERE_RECORDED)},
        "batch_size": spec.get("batch_size"),
        "backend": (spec.get("backend") or {}).get("name"),
    }


def _words(name: str) -> str:
    return {"slot_budget": "slot budget", "rows": "rows a forward"}.get(name, name)


def _value(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
