"""The field's decoders beside plain versions of their public samplers: `python -m bench.field [--json] [--quick]`.

Small random checkpoints are written in every published layout, loaded, and decoded by every decoder that serves them:
by each selection rule, with blocks of three sizes, greedily and at a temperature, alone and in a batch of 4. Ids and
forwards of every kind must be those of the plain sampler, and a batch must write what single prompts do.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import engine_for
from fluid_model.engine.records import Generation, Request
from fluid_model.settings import DecoderSettings

from .. import bars
from .plain import Written
from .plan import MODELS, RENAMED, RULES, FieldModel, FieldWorkload, comparisons, open_model, requests


@dataclass
class FieldRow:
    """Answers of one layout, decoder and selection rule, and how many of them are equal.

    counted: those whose forwards compare; those of drafts made by their cost have no plain sampler.
    """

    layout: str
    method: str
    decoder: str
    rule: str
    answers: int = 0
    ids: int = 0
    counted: int = 0
    forwards: int = 0
    batched: int = 0

    def add(self, other: FieldRow) -> None:
        """Count another row's answers, too."""
        for name in ("answers", "ids", "counted", "forwards", "batched"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def shares(self) -> list[str]:
        """Each count out of those that compare."""
        forwards = f"{self.forwards} of {self.counted}" if self.counted else ""
        return [f"{self.ids} of {self.answers}", forwards, f"{self.batched} of {self.answers}"]


HEAD = ("ids equal", "forwards equal", "batch = single")


def measure(model: FieldModel, checkpoint: Checkpoint, plan: FieldWorkload) -> list[FieldRow]:
    """Rows of one model, one a decoder and rule."""
    rows = []
    for decoder in model.decoders():
        for rule in RULES[decoder]:
            row = FieldRow(model.layout, model.method or "", decoder, rule)
            for settings, plain in comparisons(decoder, rule, plan):
                work = requests(plan)
                alone = {key: one for request in work for key, one in write(checkpoint, settings, [request], 1).items()}
                together = write(checkpoint, settings, work, 4)
                for request in work:
                    expected = plain(checkpoint, request, settings)
                    count(row, settings, expected, alone[request.key], together[request.key])
            rows.append(row)
    return rows


def write(
    checkpoint: Checkpoint, settings: DecoderSettings, work: Sequence[Request], batch: int
) -> dict[str, Generation]:
    """Answers by key."""
    return {answer.key: answer for answer in engine_for(checkpoint, settings, batch).generate(work)}


def count(row: FieldRow, settings: DecoderSettings, expected: Written, alone: Generation, batched: Generation) -> None:
    """Count one answer; what differs is named on standard error."""
    ids, forwards = expected
    compares = not settings.drafts_by_cost
    right = alone.ids == ids
    same = batched.ids == alone.ids and (not compares or batched.trace.forwards == alone.trace.forwards)
    row.answers += 1
    row.ids += right
    row.batched += same
    row.counted += compares
    row.forwards += compares and alone.trace.forwards == forwards
    if not right or not same or (compares and alone.trace.forwards != forwards):
        print(
            f"{row.layout}, {settings}, prompt {alone.key}: {alone.ids}, plain {ids}, batch {batched.ids}",
            file=sys.stderr,
        )


def table(rows: Sequence[FieldRow]) -> str:
    """Layout by decoder by rule."""
    lines = [[row.layout, row.decoder, row.rule, *row.shares] for row in rows]
    return bars.table(["layout", "decoder", "rule", *HEAD], lines)


def sums(rows: Sequence[FieldRow]) -> str:
    """One line a decoder: its layouts, its rules, and all counts together."""
    lines = []
    for decoder in dict.fromkeys(row.decoder for row in rows):
        own, total = [row for row in rows if row.decoder == decoder], FieldRow("", "", decoder, "")
        for row in own:
            total.add(row)
        names, rules = (
            ", ".join(dict.fromkeys(words)) for words in zip(*((r.layout, r.rule) for r in own), strict=True)
        )
        lines.append([f"`{decoder}`", names, rules, *total.shares])
    return bars.table(["decoder", "layouts", "rules", *HEAD], lines)


def bars_of(rows: Sequence[FieldRow]) -> list[bars.Bar]:
    """All of them must be equal."""
    total = FieldRow("", "", "", "")
    for row in rows:
        total.add(row)
    return [
        bars.at_least(f"{name}, % of {answers}", 100 * equal / answers, 100)
        for name, equal, answers in (
            (HEAD[0], total.ids, total.answers),
            (HEAD[1], total.forwards, total.counted),
            (HEAD[2], total.batched, total.answers),
        )
    ]


def main(arguments: list[str] | None = None) -> int:
    """Compare and print. Exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.field", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="blocks of 8 alone, greedy, two prompts: whether it works")
    options = parser.parse_args(arguments)
    plan = FieldWorkload(sizes=(8,), heats=(0.0,), lengths=(3, 17)) if options.quick else FieldWorkload()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate((*MODELS, *RENAMED)):
            rows += measure(model, open_model(model, Path(folder) / str(number)), plan)
    results = bars_of(rows)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "bars": [asdict(bar) for bar in results]}))
    else:
        print(f"{table(rows)}\n\n{sums(rows)}\n\n{bars.render(results, as_json=False)}")
    return 0 if all(bar.ok for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
