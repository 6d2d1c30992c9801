"""The claim ledger: what was published, beside what this machine measures. Never a copied number as measured."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fluid_model.errors import ConfigError
from fluid_model.settings import DECODERS

from .paths import resource
from .spec import build_spec


@dataclass(frozen=True)
class Claim:
    """One published cell.

    weights: name of the model's folder below the models folder.  value: percent, as published.
    run: further settings of the run that measures it.
    """

    system: str
    weights: str
    task: str
    metric: str
    value: float
    source: str
    note: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it. measured: a line of a result, or None where nothing was run."""

    claim: Claim
    measured: Mapping[str, Any] | None
    verdict: str


def read_claims(file: Path | None = None) -> list[Claim]:
    """The ledger's claims, in file order. Raises ConfigError naming the file and the claim that cannot be read."""
    file = file or resource("reports") / "claims.toml"
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))["claim"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(f"{file}: no claim ledger ({error})") from error
    claims = []
    for number, entry in enumerate(entries, 1):
        try:
            claims.append(Claim(**entry))
        except TypeError as error:
            raise ConfigError(f"{file}, claim {number}: {error}") from error
    return claims


def judge(claim: Claim, line: Mapping[str, Any]) -> str:
    """Whether the published value lies inside the measured 95% interval."""
    return "reproduced" if 100 * line["low"] <= claim.value <= 100 * line["high"] else "not reproduced"


def reproduce(out: Path, *, data_dir: str | None, models_dir: str | None) -> list[Finding]:
    """Measure every claim whose weights are here, print the table and return it. Runs are kept below `out`."""
    findings = []
    for claim in read_claims():
        folder = Path(models_dir or "models") / claim.weights
        decoder = claim.run.get("decoder", "ar")
        if decoder not in DECODERS:
            findings.append(Finding(claim, None, f"not run: needs decoder {decoder}"))
        elif not folder.is_dir():
            findings.append(Finding(claim, None, f"not run: needs {claim.weights}/"))
        else:
            line = _measure(claim, folder, out, data_dir)
            findings.append(Finding(claim, line, judge(claim, line)))
    _print(findings)
    return findings


def _measure(claim: Claim, model: Path, out: Path, data_dir: str | None) -> Mapping[str, Any]:
    from .run import run

    values = {"tasks": [claim.task], "model": {"path": str(model)}, "data_dir": data_dir, **claim.run}
    spec = build_spec(values)
    result = run(spec, out / f"{claim.task}-{claim.weights}-{spec.id}", resume=True)
    metric, _, used = claim.metric.partition(",")
    for line in result["lines"]:
        if line["metric"] == metric and used in ("", line["filter"]):
            return dict(line)
    raise ConfigError(f"claim {claim.system} on {claim.task}: the task has no metric {claim.metric!r}")


def _print(findings: list[Finding]) -> None:
    from .show import score

    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("system", "task", "published", "measured", "n", "verdict"):
        table.add_column(name, justify="right" if name in ("published", "measured", "n") else "left")
    for finding in findings:
        claim, line = finding.claim, finding.measured
        measured = (score(line), str(line["n"])) if line else ("–", "–")
        table.add_row(claim.system, claim.task, f"{claim.value:.1f}", *measured, finding.verdict)
    console.print(table)
    if any(finding.measured is None for finding in findings):
        console.print("NAME/: the model's folder below --models-dir (or FLUID_MODELS_DIR)")
