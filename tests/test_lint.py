"""Rules that find claims that clash, each on made-up ledgers, all on the bundled one."""

from __future__ import annotations

from dataclasses import replace

from fluid_eval.claims import Ledger, Source, System, read_claims
from fluid_eval.lint import lint

from .test_claims import claim

SEVERAL = (System("s", "w", own=("report",)), System("t", "w", parent="s"), System("whole s", "w", same_as="s"))


def ledger(*claims, whole=(), generated=False):
    sources = {c.source: Source(c.source, "", whole, generated) for c in claims}
    return Ledger(tuple(claims), {system.name: system for system in SEVERAL}, sources)


def kinds(*claims, **more):
    return [clash.kind for clash in lint(ledger(*claims, **more))]


def test_a_cell_of_another_column_is_flagged():
    own = claim(task="mbpp", value=79.2, source="report")
    assert kinds(claim(task="humaneval", value=79.2), own) == ["equals another column"]
    assert kinds(claim(task="humaneval", value=79.3), own) == []
    right = claim(task="humaneval", value=79.2, source="report")
    assert kinds(claim(task="humaneval", value=79.2), own, right) == [], "it is reported for its task, too"
    here = claim(task="mmlu", value=79.2)
    assert kinds(claim(task="humaneval", value=79.2), here) == ["equals another column"]
    assert kinds(claim(task="humaneval", value=79.2), here, generated=True) == [], "a program does not slip"
    assert kinds(claim(task="humaneval", value=79.2), replace(here, system="whole s")) == []


def test_a_value_far_from_the_systems_own_is_flagged():
    """GSM8K at 50%: a half-width of 2.7 points."""
    own = claim(value=50.0, source="report")
    assert kinds(claim(value=52.6), own) == []
    assert kinds(claim(value=52.8), own) == ["contradicts the system's own report"]
    assert kinds(claim(value=47.2), own) == ["contradicts the system's own report"]
    assert kinds(claim(value=60.0), own, claim(value=59.0, source="report", convention="x")) == [], (
        "near one of several"
    )
    assert kinds(claim(task="humaneval", value=56.0), claim(task="humaneval", source="report")) == [], "164 questions"
    assert kinds(claim(task="mbpp", value=90.0), claim(task="mbpp", source="report")) == [], "of unknown size"
    assert kinds(claim(value=90.0), claim(value=50.0, source="elsewhere")) == [], "not its authors'"


def test_a_missing_parent_is_flagged_in_tables_that_are_known_whole():
    child, parent = claim(system="t"), claim(system="s", value=51.0)
    elsewhere = replace(parent, source="report")
    assert kinds(child, elsewhere, whole=("main",)) == ["no row of its parent"]
    assert kinds(child, parent, whole=("main",)) == []
    assert kinds(child, replace(parent, table="own")) == [], "not whole: the row may be there"
    assert kinds(child, replace(parent, table="own"), whole=("ablation",)) == []
    assert kinds(child, replace(parent, table="own"), whole=("main",)) == ["no row of its parent"]


def test_a_parent_without_a_score_on_any_task_of_its_child_is_flagged():
    child, parent = claim(system="t"), claim(system="s", source="elsewhere")
    assert kinds(child, parent) == []
    assert kinds(child) == ["no score of its parent"]
    assert kinds(child, replace(parent, task="mmlu")) == ["no score of its parent"]
    both = claim(system="t", task="mmlu", value=51.0), replace(parent, task="mmlu")
    assert kinds(child, *both) == [], "one in common"
    speed = claim(system="t", unit="tok/forward", metric="tokens_per_forward")
    assert kinds(speed) == [], "a count is no cost in score"


def test_a_speed_without_hardware_is_flagged():
    speed = claim(unit="tok/s", metric="tokens_per_second")
    assert kinds(speed) == ["speed without hardware"]
    assert kinds(replace(speed, hardware="H100")) == []
    assert kinds(claim(unit="times", metric="speed-up")) == ["speed without hardware"]
    assert kinds(claim(unit="tok/forward", metric="tokens_per_forward")) == [], "counts are the same everywhere"


def test_an_ablation_must_end_where_the_main_table_is():
    main_row, whole = claim(system="s"), claim(system="whole s", table="ablation")
    assert kinds(main_row, whole) == []
    assert kinds(main_row, replace(whole, value=50.4)) == ["ablation differs from the main row"]
    assert kinds(main_row, replace(whole, value=50.4, source="other")) == []
    assert kinds(main_row, replace(whole, value=50.4, metric="another")) == ["ablation differs from the main row"]
    assert kinds(main_row, replace(whole, value=50.4, task="math500")) == []


def test_what_clashes_in_the_bundled_ledger():
    found = lint(read_claims())
    told = {(clash.kind, clash.cells[0]) for clash in found}
    assert {
        ("equals another column", "Qwen-2.5-7B humaneval 79.2 (FLUID)"),
        ("equals another column", "Qwen-2.5-7B math500 84.8 (FLUID)"),
        ("equals another column", "LLaDA-8B math500 34.2 (FLUID)"),
        ("contradicts the system's own report", "LLaDA-8B gsm8k 36.2 (FLUID)"),
        ("no row of its parent", "FLUID-7B (FLUID, main table)"),
        ("no score of its parent", "NBDiff-7B-Instruct (NBDiff)"),
        ("speed without hardware", "FLUID-7B mmlu 18.82 tok/s (FLUID)"),
    } <= told
    assert not any("tiny" in cell for clash in found for cell in clash.cells)
    held = read_claims()
    for one in held.claims:
        if held.systems[one.system].same_as and one.value > 6.3:
            moved = tuple(replace(other, value=one.value - 6.3) if other is one else other for other in held.claims)
            new = {clash.cells[0] for clash in lint(replace(held, claims=moved))} - {clash.cells[0] for clash in found}
            assert any(cell.startswith(f"{one.system} {one.task} ") for cell in new), one.cell
            (main_row,) = [
                other for other in held.claims
                if (other.system, other.task, other.table) == (held.systems[one.system].same_as, one.task, "main")
            ]  # fmt: skip
            assert (one.metric, one.stated) == (main_row.metric, main_row.stated), "one number, one convention"
