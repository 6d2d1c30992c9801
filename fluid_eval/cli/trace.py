"""`fluid-eval trace`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from .options import BUNDLED, integer

HELP = "how one answer is decoded, forward by forward"
SLOT_BUDGET = 64
"""Of a trace that sets none."""
EXAMPLE = 'fluid-eval trace --prompt "Question: 2 + 3?\\nAnswer:"'


def add(trace: argparse.ArgumentParser) -> None:
    trace.add_argument("--model", metavar="PATH_OR_HUB_ID", help="default: the bundled tiny-fluid")
    trace.add_argument(
        "--decoder", metavar="NAME", help="`fluid-eval decoders` lists them; default: that of the model, else ar"
    )
    trace.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; \\n is a new line")
    trace.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help=f"any setting, e.g. decoder.confidence=0.9; decoder.slot_budget is {SLOT_BUDGET} here unless set",
    )
    trace.add_argument("--max-new-tokens", type=integer, default=64, metavar="N", help="length limit; default: 64")
    trace.add_argument("--markdown", action="store_true", help="a Markdown table instead of colours")


def main(options: argparse.Namespace) -> int:
    from fluid_model.common.fields import assign, put
    from fluid_model.registry import decoder_settings, plain_values

    from ..common.paths import resource
    from ..common.spec import build_spec
    from ..running.decoder_choice import with_decoder

    # 1) the spec of a run with one prompt
    bundled = {"path": str(resource("checkpoints") / BUNDLED)}
    values: dict[str, Any] = {"tasks": "mini", "model": {"path": options.model} if options.model else bundled}
    if options.decoder:
        put(values, "decoder.name", options.decoder)
    put(values, "max_new_tokens", options.max_new_tokens)
    for setting in options.set:
        assign(values, setting)
    spec = build_spec(with_decoder(values))
    if spec.decoder.drafts_by_time:
        # drafts to look at, even where they would not pay on this machine
        spec = replace(spec, decoder=decoder_settings({**plain_values(spec.decoder), "slot_budget": SLOT_BUDGET}))
    # 2) decode and print
    from ..analysis.trace import markdown, show, trace_answer

    records, answer = trace_answer(spec, options.prompt.replace("\\n", "\n"))
    if options.markdown:
        print(markdown(records))
    else:
        show(records, answer, spec.to_dict()["decoder"])
    return 0
