"""What a run's speeds hold under: in forwards, for decoders that draft by what a slot costs, and in seconds. No torch.

Where FLUID verifies in rounds of one forward it feeds a slot only where that pays, so tokens/forward depend on the slot
budget in force and on the rows that share a forward. What was not recorded is unknown: it never counts as equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluid_model.common.files import Nested

UNKNOWN = "not recorded"
MACHINE = ("device", "dtype", "threads", "workers", "forward", "processor", "cpus")
WHERE_RECORDED = ("forward_kind",)
"""Of the machine, too, but not of runs recorded before it was: compared only where both runs have it."""
DRAFTING = ("slot_budget", "rows", "forward")


def describe(environment: Mapping[str, Any], spec: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Nested:
    """A run's conditions, as its result keeps them; None for what was not recorded.

    slot_budget, rows: of each answer, as decided how much was drafted, each value once (more than one: the run was
    broken off and went on under others, or memory ran out); None where drafts do not depend on them.  forward: whose.
    batch_size: as asked.  sessions: processes that answered.
    """
    engine = environment.get("engine", {})
    found: Nested = {
        "drafts_by_cost": drafts_by_cost(spec),
        "forward": engine.get("forward"),
        "batch_size": spec.get("batch_size"),
        "sessions": environment.get("sessions"),
    }
    wrote = [record for record in records if record.get("output_ids")]
    for name in ("slot_budget", "rows"):
        held = [record.get("draft_policy", {}).get(name) for record in wrote]
        known = bool(held) and None not in held
        found[name] = sorted(set(held)) if known and found["drafts_by_cost"] else None
    return found


def drafts_by_cost(spec: Mapping[str, Any]) -> bool:
    """Whether a run's decoder drafts by what a slot costs: FLUID that verifies, in rounds of one forward."""
    decoder = spec.get("decoder") or {}
    return decoder.get("name") == "fluid" and decoder.get("rounds", "one") == "one" and decoder.get("verify", True)


def unequal_forwards(base: Nested, other: Nested) -> list[str]:
    """Why tokens/forward of two runs, by their conditions, are not of the decoders alone. Empty where they are.

    Two runs that draft by cost need the same budget and rows; beside one that does, the other needs the same forward.
    """
    drafting = [run for run in (base, other) if run["drafts_by_cost"]]
    if not drafting:
        return []
    found = []
    for name in DRAFTING if len(drafting) == 2 else ("forward",):
        ours, theirs = base[name], other[name]
        if ours is None or theirs is None:
            found.append(f"{_words(name)}: {UNKNOWN}")
        elif ours != theirs:
            found.append(f"{_words(name)}: {_value(ours)} / {_value(theirs)}")
    for who, run in (("the base", base), ("the other", other)):
        mixed = [_words(name) for name in ("slot_budget", "rows") if len(run[name] or ()) > 1]
        if run["drafts_by_cost"] and mixed:
            found.append(f"{' and '.join(mixed)} changed while {who} ran")
    return found


def told(run: Nested) -> str | None:
    """What a run's tokens/forward hold under, in words; None where they depend on neither budget nor rows."""
    if not run["drafts_by_cost"]:
        return None
    return ", ".join(f"{_words(name)} {_value(run[name])}" for name in ("slot_budget", "rows"))


def unequal_seconds(base: Nested, other: Nested) -> list[str]:
    """Why tokens/s of two runs do not compare: what of where they ran differs or is not known. Empty if they do.

    base, other: as `machine` gives them.
    """
    unknown = [name for name in MACHINE if base[name] is None or other[name] is None]
    if unknown:
        return [f"{', '.join(unknown)}: {UNKNOWN}"]
    both = [name for name in WHERE_RECORDED if base.get(name) is not None and other.get(name) is not None]
    names = (*MACHINE, *(both if base["forward"] == other["forward"] else ()), "batch_size")
    return [f"{name}: {base[name]} / {other[name]}" for name in names if base[name] != other[name]]


def machine(environment: Mapping[str, Any], spec: Mapping[str, Any]) -> Nested:
    """What makes a run's seconds."""
    where = {**environment, **environment.get("engine", {})}
    return {**{name: where.get(name) for name in (*MACHINE, *WHERE_RECORDED)}, "batch_size": spec.get("batch_size")}


def _words(name: str) -> str:
    return {"slot_budget": "slot budget", "rows": "rows a forward"}.get(name, name)


def _value(found: Any) -> str:
    if found is None:
        return UNKNOWN
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)
