"""A report as one HTML page that opens from disk, with style, script and samples inside."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup

from fluid_model.engine.records import KINDS

from ...analysis.compare import entries
from ...common.paths import resource
from ...sweeps.captions import conditions
from ...sweeps.pareto import Speed
from .. import claims_tables
from ..figures import score_speed, tokens_per_forward
from ..terminal import difference, number, probability, ratio, score, speed
from . import facts as state
from . import setup
from .facts import SIGNS, Facts
from .runs import model_name
from .samples import MOST_SAMPLES, block

TEMPLATE = "page.html.j2"
SCRIPTS = ("page.js", "trace.js", "samples.js")


def templates() -> jinja2.Environment:
    """Templates of reports/report/ with their filters. Every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource("reports") / "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": score, "number": number, "value": setup.value, "duration": setup.duration}
    environment.filters |= {
        "published": claims_tables.published,
        "measured": claims_tables.measured,
        "convention": claims_tables.convention,
    }
    environment.filters |= {
        "audit_state": state.audit_state,
        "claim_state": state.claim_state,
        "in_tables": claims_tables.in_tables,
        "stands": claims_tables.stands,
    }
    environment.filters |= {"quoted": partial(json.dumps, ensure_ascii=False)}  # quotes make spaces visible
    environment.filters |= {"ratio": ratio, "speed": speed}
    environment.filters |= {"difference": difference, "probability": probability, "entries": entries}
    return environment


def render(facts: Facts) -> str:
    """The HTML page. Every value is escaped, except our figures and the samples' JSON, which is safe (`samples`)."""
    folder = resource("reports") / "report"
    script = _script(folder)
    return (
        templates()
        .get_template(TEMPLATE)
        .render(
            facts=facts,
            claims_legend=claims_tables.LEGEND,
            runs=facts.runs,
            several=len(facts.runs) > 1,
            title=_title(facts),
            kinds=_kinds(facts),
            figures=[Markup(svg) for svg in _figures(facts) if svg],
            conditions=conditions([(run.spec, run.environment) for run in facts.runs]),
            protocol=setup.protocol,
            setups=setup.setups,
            grouped=setup.grouped,
            signs=SIGNS,
            samples=block(facts.runs),
            most=MOST_SAMPLES,
            markup=Markup,
            style=Markup((folder / "style.css").read_text(encoding="utf-8")),
            script=Markup(script),
            digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _script(folder: Path) -> str:
    """The page's only script. The content security policy allows it by its hash, and no other."""
    parts = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _title(facts: Facts) -> str:
    first = facts.runs[0]
    if len(facts.runs) > 1:
        return f"{len(facts.runs)} runs: " + ", ".join(dict.fromkeys(model_name(run.spec) for run in facts.runs))
    return f"{model_name(first.spec)}, {first.result['decoder']['name']}: {', '.join(first.spec['tasks'])}"


def _kinds(facts: Facts) -> list[str]:
    """Kinds of forward that occur in any run."""
    lines = [line for run in facts.runs for line in run.result["lines"]]
    return [kind for kind in KINDS if any(line.get("forwards_by_kind", {}).get(kind) for line in lines)]


def _figures(facts: Facts) -> list[str]:
    several = len(facts.runs) > 1
    speeds: tuple[Speed, ...] = ("tokens_per_second", "tokens_per_forward") if several else ("tokens_per_second",)
    figures = [score_speed(facts.placed, by, comparable=several and not facts.apart) for by in speeds]
    return figures if several else [*figures, tokens_per_forward(facts.runs[0].result["lines"])]
