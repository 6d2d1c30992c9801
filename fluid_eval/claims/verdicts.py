"""What a measurement says of a published number: reproduced, not reproduced, or neither at this n.

reproduced      surely within the margin of the number as it stands: two one-sided tests, 5% each
not reproduced  surely further off than the margin, the published number's own chance counted too; over a whole table at
                most 5% hold one such verdict by chance (Holm)
cannot tell     neither; with the questions it would take

A project's own figures are no claims of others. Run again they are equal to the last digit published, or they differ.
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
    """How far apart two numbers may be and still be one result, where a claim does not say.

    points: of scores. Three are less than most gaps that this field's tables argue from, and enough for GSM8K's and
    MMLU's sizes to decide in one run; MATH500's 500 and HumanEval's 164 questions are often too few for it, and that is
    said rather than hidden in a wider one.  percent: of speeds and counts, of the published value.
    """

    points: float = 3.0
    percent: float = 5.0

    def __post_init__(self) -> None:
        check_range("margin", self.points, 0, 100, open_low=True)
        check_range("speed_margin", self.percent, 0, 100, open_low=True)

    def of(self, claim: Claim) -> float:
        """In the claim's unit."""
        if claim.margin is not None:
            return claim.margin
        return self.points if claim.unit == "%" else self.percent / 100 * claim.value


@dataclass(frozen=True)
class Finding:
    """A claim and what was measured of it (shares for scores). as_stated: by the convention it states, or it states
    none.  own: of this project's own figures.
    """

    claim: Claim
    measured: Interval
    as_stated: bool = True
    own: bool = False


@dataclass(frozen=True)
class Judgement:
    """verdict: the word, what is unstated, then what it rests on.  margin: in the claim's unit, with p_within and
    p_beyond (corrected) of both tests; None where no test was made.
    """

    verdict: str
    margin: float | None = None
    p_within: float | None = None
    p_beyond: float | None = None


def judge(findings: Sequence[Finding], margins: Margins | None = None) -> list[Judgement]:
    """A judgement of each, corrected for how many there are."""
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
    claim, found = finding.claim, finding.measured
    share, low, high = _bounds(claim, margin)
    p_within = within(found, low, high, share=share) if found.bounded else 1.0
    said = f"{_number(claim, margin)}"
    if not found.bounded:
        told = f"{CANNOT_TELL}{_unstated(claim)}: n = {found.n:,} is too few for an interval"
    elif p_within <= LEVEL:
        told = f"{REPRODUCED}{_unstated(claim)}: within {said}"
    elif p_beyond <= LEVEL:
        told = f"{NOT_REPRODUCED}{_unstated(claim)}: {_number(claim, _off(finding))} off, surely more than {said}"
    else:
        told = f"{CANNOT_TELL}{_unstated(claim)}: n = {found.n:,} is too few for {said}, {_enough(finding, margin)}"
    return Judgement(told, margin, p_within, p_beyond)


def _enough(finding: Finding, margin: float) -> str:
    """The n it would take were the published number exactly right, or as far off as seen where that n was had."""
    claim, found = finding.claim, finding.measured
    scale = 100 if claim.unit == "%" else 1
    spread = (found.high - found.low) / (2 * Z95) * math.sqrt(found.n)
    spread = math.sqrt(claim.value / 100 * (1 - claim.value / 100)) if claim.unit == "%" else spread
    off = _off(finding)
    n = questions_needed(spread, margin / scale)
    if claim.unit == "%" and margin < scale:  # a share of 0 or 1 has no spread, and yet takes some
        n = max(n, math.ceil(math.log(LEVEL) / math.log(1 - margin / scale)))
    if n > found.n:
        return f"about {n:,} would do if it is right"
    n = questions_needed(spread, abs(margin - off) / scale)
    return f"about {n:,} would do if it is {_number(claim, off)} off, as seen"


def _beyond(finding: Finding, margin: float) -> float:
    if not finding.measured.bounded:
        return 1.0
    share, low, high = _bounds(finding.claim, margin)
    n = published_n(finding.claim) if share else None
    return beyond(finding.measured, low, high, share=share, published_n=n)


def _bounds(claim: Claim, margin: float) -> tuple[bool, float, float]:
    """Whether it is a share, and what counts as equal to the published value, its rounding and range included."""
    share = claim.unit == "%"
    scale = 100 if share else 1
    end = claim.value if claim.to is None else claim.to
    return share, (claim.value - claim.rounding - margin) / scale, (end + claim.rounding + margin) / scale


def _off(finding: Finding) -> float:
    """From the measured value to the nearest published one, in the claim's unit."""
    claim, scale = finding.claim, 100 if finding.claim.unit == "%" else 1
    seen, end = scale * finding.measured.mean, finding.claim.value if claim.to is None else claim.to
    return max(0.0, claim.value - seen, seen - end)


def _rerun(finding: Finding) -> str:
    """Equal to the last digit published, or by how much not."""
    claim, off = finding.claim, _off(finding)
    return EQUAL if off <= claim.rounding + 1e-9 else f"{DIFFERS}: by {_number(claim, off)}"


def _number(claim: Claim, value: float) -> str:
    """A difference in the claim's unit."""
    return f"{value:.1f} points" if claim.unit == "%" else f"{value:.3g} {claim.unit}"


def _unstated(claim: Claim) -> str:
    """What the published number leaves open, so that a miss may be for that."""
    left = [name for name, told in (("convention", claim.profile), ("decoder", not claim.decoder_unknown)) if not told]
    return f" ({' and '.join(left)} {UNSTATED})" if left else ""
