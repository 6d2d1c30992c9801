"""Verdicts on published numbers: reproduced, not reproduced, or undecided at this n.

reproduced      within the margin of the published number: two one-sided tests, 5% each (TOST)
not reproduced  further off than the margin, the published number's own sampling error included; corrected over the
                whole table, so that at most 5% of tables hold one such verdict by chance (Holm)
cannot tell     neither; the verdict names the number of questions that would decide

The project's own figures are not claims of others. Run again, they are equal to the last published digit, or differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fluid_model.settings import check_range

from ..common.stats import Z95, Interval
from .equivalence import LEVEL, beyond, holm, questions_needed, within
from .ledger import UNSTATED, Claim, published_n

REPRODUCED, NOT_REPRODUCED, CANNOT_TELL = "reproduced", "not reproduced", "cannot tell"
OTHER, NOT_RUN = "different convention", "not run"
EQUAL, DIFFERS = "re-run, equal", "re-run, differs"


@dataclass(frozen=True)
class Margins:
    """Default margins: differences up to these count as the same result, unless a claim has a margin of its own.

    points: of scores. Three are fewer than most gaps that this field's tables argue from, and one run over GSM8K or
    MMLU decides them. MATH500's 500 and HumanEval's 164 questions are often too few; the verdict then says so.
    percent: of speeds and counts, in percent of the published value.
    """

    points: float = 3.0
    percent: float = 5.0

    def __post_init__(self) -> None:
        check_range("margin", self.points, 0, 100, open_low=True)
        check_range("speed_margin", self.percent, 0, 100, open_low=True)

    def of(self, claim: Claim) -> float:
        """The margin for a claim, in its unit."""
        if claim.margin is not None:
            return claim.margin
        return self.points if claim.unit == "%" else self.percent / 100 * claim.value


@dataclass(frozen=True)
class Finding:
    """A claim and its measurement (shares for scores).

    as_stated: measured by the convention that the claim states, or it states none.
    own: the claim is one of this project's own figures.
    """

    claim: Claim
    measured: Interval
    as_stated: bool = True
    own: bool = False


@dataclass(frozen=True)
class Judgement:
    """A verdict and the tests behind it.

    verdict: its kind, unstated conditions and the reason: `cannot tell (convention not stated): n = 40 is too few ..`
    margin: in the claim's unit.  p_within, p_beyond: of both tests, p_beyond corrected by Holm. None without a test.
    """

    verdict: str
    margin: float | None = None
    p_within: float | None = None
    p_beyond: float | None = None


def judge(findings: Sequence[Finding], margins: Margins | None = None) -> list[Judgement]:
    """A judgement of each finding; p values are corrected over all tested findings."""
    margins = margins or Margins()
    tested = [f for f in findings if f.as_stated and not f.own]
    corrected = iter(holm([_beyond(f, margins.of(f.claim)) for f in tested]))
    judged = []
    for finding in findings:
        if not finding.as_stated:
            judged.append(Judgement(OTHER))
        elif finding.own:
            judged.append(Judgement(_rerun(finding)))
        else:
            judged.append(_judgement(finding, margins.of(finding.claim), next(corrected)))
    return judged


def _judgement(finding: Finding, margin: float, p_beyond: float) -> Judgement:
    claim, measured = finding.claim, finding.measured
    share, low, high = _bounds(claim, margin)
    p_within = within(measured, low, high, share=share) if measured.bounded else 1.0
    shown, unstated = _number(claim, margin), _unstated(claim)
    if not measured.bounded:
        verdict = f"{CANNOT_TELL}{unstated}: n = {measured.n:,} is too few for an interval"
    elif p_within <= LEVEL:
        verdict = f"{REPRODUCED}{unstated}: within {shown}"
    elif p_beyond <= LEVEL:
        verdict = f"{NOT_REPRODUCED}{unstated}: {_number(claim, _off(finding))} off, surely more than {shown}"
    else:
        verdict = f"{CANNOT_TELL}{unstated}: n = {measured.n:,} is too few for {shown}, {_enough(finding, margin)}"
    return Judgement(verdict, margin, p_within, p_beyond)


def _enough(finding: Finding, margin: float) -> str:
    """The number of questions that would decide.

    First if the published number is exactly right; where the measurement had that many, if it is as far off as seen.
    """
    claim, measured = finding.claim, finding.measured
    # 1) standard deviation of one question's value
    scale = 100 if claim.unit == "%" else 1
    if claim.unit == "%":
        spread = math.sqrt(claim.value / 100 * (1 - claim.value / 100))
    else:
        spread = (measured.high - measured.low) / (2 * Z95) * math.sqrt(measured.n)
    # 2) questions if the published number is right; a share of 0 or 1 has no spread but needs some
    off = _off(finding)
    n = questions_needed(spread, margin / scale)
    if claim.unit == "%" and margin < scale:
        n = max(n, math.ceil(math.log(LEVEL) / math.log(1 - margin / scale)))
    if n > measured.n:
        return f"about {n:,} would do if it is right"
    n = questions_needed(spread, abs(margin - off) / scale)
    return f"about {n:,} would do if it is {_number(claim, off)} off, as seen"


def _beyond(finding: Finding, margin: float) -> float:
    """Uncorrected p that the true value lies beyond the margin; 1 for a measurement without an interval."""
    if not finding.measured.bounded:
        return 1.0
    share, low, high = _bounds(finding.claim, margin)
    n = published_n(finding.claim) if share else None
    return beyond(finding.measured, low, high, share=share, published_n=n)


def _bounds(claim: Claim, margin: float) -> tuple[bool, float, float]:
    """(is a share, low, high): bounds of the values equal to the published one, its rounding and range included."""
    share = claim.unit == "%"
    scale = 100 if share else 1
    end = claim.value if claim.to is None else claim.to
    return share, (claim.value - claim.rounding - margin) / scale, (end + claim.rounding + margin) / scale


def _off(finding: Finding) -> float:
    """Distance of the measured value from the nearest published one, in the claim's unit."""
    claim, scale = finding.claim, 100 if finding.claim.unit == "%" else 1
    seen, end = scale * finding.measured.mean, finding.claim.value if claim.to is None else claim.to
    return max(0.0, claim.value - seen, seen - end)


def _rerun(finding: Finding) -> str:
    """Verdict on an own figure: equal to the last published digit, or the difference."""
    claim, off = finding.claim, _off(finding)
    return EQUAL if off <= claim.rounding + 1e-9 else f"{DIFFERS}: by {_number(claim, off)}"


def _number(claim: Claim, value: float) -> str:
    """A difference in the claim's unit."""
    return f"{value:.1f} points" if claim.unit == "%" else f"{value:.3g} {claim.unit}"


def _unstated(claim: Claim) -> str:
    """Conditions that the published number leaves open, which may explain a difference."""
    unstated = ["convention"] * (not claim.profile) + ["decoder"] * claim.decoder_unknown
    return f" ({' and '.join(unstated)} {UNSTATED})" if unstated else ""
