"""Claims judged again from the measurements in an earlier claims.json: `fluid-eval reproduce --measured FILE`.

Nothing is run: measured numbers, and the reasons of claims that were not measured, are those of the file; published
numbers, notes, conflicts and verdicts are those of the ledger now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluid_model.common.files import Nested

from ..common.stats import Interval
from .ledger import Claim, Ledger
from .reproduce import MeasuredClaim, conclude, not_run
from .verdicts import NOT_RUN, OTHER, Judgement, Margins

NEVER_TRIED = "not tried yet"
_KEY = ("table", "system", "task", "metric", "decoder", "source", "where", "profile")
"""Fields that tell a ledger's claims apart."""


def judge_again(
    ledger: Ledger,
    claims: Sequence[Claim],
    before: Mapping[str, Any],
    out: Path,
    *,
    margins: Margins | None = None,
) -> Nested:
    """Judge claims by the measurements of `before`, an earlier claims.json as read. Writes and returns claims.json."""
    stored = {_key(row, row["convention"]["published"]): row for row in before["rows"]}
    rows = [_as_measured(claim, stored.get(_key(vars(claim), claim.stated))) for claim in claims]
    return conclude(ledger, rows, out, margins)


def without_folders(result: Nested) -> Nested:
    """A claims.json without the run folders of the machine that measured it."""
    return {**result, "rows": [{**row, "run": None} for row in result["rows"]]}


def _key(values: Mapping[str, Any], stated: Any) -> tuple[Any, ...]:
    return (*(values.get(name) for name in _KEY), stated)


def _as_measured(claim: Claim, row: Nested | None) -> MeasuredClaim:
    """A claim with what the file says of it."""
    if row is None:
        return not_run(claim, NEVER_TRIED)
    run, taken = None if row["run"] is None else Path(row["run"]), row.get("taken")
    if (value := row["measured"]) is None:
        return not_run(claim, row["verdict"].removeprefix(f"{NOT_RUN}: "), run, taken)
    low, high = (math.nan if value[end] is None else value[end] for end in ("low", "high"))
    return MeasuredClaim(
        claim, Judgement(""), Interval(value["score"], low, high, value["n"]),
        as_stated=row["verdict"] != OTHER, protocol=row["convention"]["measured"], run=run, taken=taken,
    )  # fmt: skip
