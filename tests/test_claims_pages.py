"""The pages that repeat the ledger's claims: its own figures, docs/claims.md, the README."""

from __future__ import annotations

import json
import re

from bench.family import SYSTEMS
from fluid_eval.benchmarks.task_index import catalogue
from fluid_eval.claims.ledger import read_claims
from fluid_eval.claims.measured_before import NEVER_TRIED
from fluid_eval.cli.main import main
from fluid_eval.common.paths import resource
from fluid_model.registry import decoders


def test_the_ledger_claims_of_the_tiny_family_what_its_page_says():
    """The family's scores are published by a program: the ledger's copy is the same to the decimal."""
    stored = json.loads((resource("checkpoints") / "family.json").read_text())
    page = (resource("checkpoints").parent / "docs" / "tiny-family.md").read_text()
    result = read_claims()
    ours = [c for c in result.claims if c.source == "tiny family"]
    assert len(ours) == 6 * 5
    for one in ours:
        system = result.systems[one.system]
        wanted = system.weights, system.run.get("decoder", {"name": "ar"})
        (label,) = [s.label for s in SYSTEMS if (s.checkpoint, s.decoder) == wanted]
        if one.unit == "%":
            assert one.value == round(100 * stored[label][one.task][0], 1), one.cell
        else:
            row = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
            assert f"{one.value:.2f}" == row.split("|")[7].strip(), one.cell


def test_the_ledger_claims_of_smollm2_what_its_page_says():
    """Scores and tokens/forward of the page's table of benchmarks."""
    page = (resource("checkpoints").parent / "docs" / "smol.md").read_text()
    table = page.partition("<!-- python -m bench.smol --only benchmarks -->\n")[2].partition("\n\n")[0].splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if "---" not in line]
    cells = {
        (row[0].replace(",", ""), task): cell for row in rows for task, cell in zip(head[1:], row[1:], strict=True)
    }
    claims = [c for c in read_claims().claims if c.table == "smol"]
    assert len(claims) == 2 * (1 + 2 * 4) + 1
    for one in claims:
        (label,) = {label for label, _ in cells if label.startswith(one.system) and "lm-eval" not in label}
        cell = cells[label, one.task]
        shown = cell.split()[0] if one.unit == "%" else cell.rpartition("(")[2].rstrip(")")
        assert f"{one.value:.{1 if one.unit == '%' else 2}f}" == shown, one.cell


def test_the_page_of_claims_is_what_the_command_writes_from_what_was_measured(tmp_path, capsys):
    """No word of it is written by hand, and the ledger has no claim that it lacks."""
    docs = resource("checkpoints").parent / "docs"
    words = ["--measured", str(docs / "claims.json"), "--docs", str(tmp_path / "page.md"), "--out", str(tmp_path)]
    assert main(["reproduce", *words]) == 0
    assert (tmp_path / "page.md").read_text() == (docs / "claims.md").read_text()
    assert (tmp_path / "page.json").read_text() == (docs / "claims.json").read_text()
    assert NEVER_TRIED not in (docs / "claims.md").read_text()
    rows = json.loads((docs / "claims.json").read_text())["rows"]
    assert sum(row["measured"] is not None for row in rows) >= 31
    assert {row["run"] for row in rows} == {None}, "no path of the machine that measured"


def test_a_reason_on_the_page_of_claims_is_not_out_of_date():
    """A decoder or task that a reason names as missing is not in this package yet."""
    page = (resource("checkpoints").parent / "docs" / "claims.md").read_text()
    wanted = re.findall(r"not run: needs (decoder|task) ([^,|]+?)(?:,| \|)", page)
    assert wanted
    for what, name in wanted:
        known = name in decoders() if what == "decoder" else catalogue().find(name) is not None
        assert not known, f"{what} {name} is here: write the page again"


def test_the_readme_says_how_many_claims_of_others_were_measured():
    """The number in the ledger, and the number on the page of what was measured last."""
    result = read_claims()
    others = {(c.system, c.source) for c in result.claims if not result.ours(c)}
    root = resource("checkpoints").parent
    page = (root / "docs" / "claims.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in page if line.startswith("| ")]
    measured = sum(
        any(re.match(r"20\d\d-", cell) for cell in row) and not row[1].startswith(("tiny", "smol", "stories"))
        for row in rows
    )
    total = sum(not result.ours(c) for c in result.claims)
    assert others
    assert f"Of the {total} claims of others, {measured} have been measured" in (root / "README.md").read_text()
