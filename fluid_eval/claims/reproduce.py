"""Measures what this machine can of the claim ledger, and judges each claim by what was measured.

Claims that share weights, settings and convention share a run. What cannot be run is said with what it needs; a
published number never stands in for a measured one.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from fluid_model.common import replace_folder
from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested, read_json
from fluid_model.settings import DECODERS

from ..benchmarks import datasets, lm_eval_tasks
from ..benchmarks import profiles as protocol
from ..benchmarks.profiles import chat_of
from ..common.paths import resource
from ..common.spec import DEFAULT_PROFILE, RunSpec, build_spec
from ..common.stats import Interval, geometric, ratio_of_sums
from ..results import speed_repeats
from ..results.run_folder import ENVIRONMENT, RUN_FILES, Record, held_spec, read_samples, write_json
from ..results.sample_records import in_order
from ..running.job import default_folder, run
from ..sandbox.ladder import strongest_tier as isolation
from .conflicts import lint
from .ledger import Claim, Ledger, System
from .verdicts import NOT_RUN, Finding, Judgement, Margins, judge

CLAIMS = "claims.json"
SPEED_REPEATS = 5
"""How often answers are timed again where a claim is in tokens/s."""
CELL = ("table", "system", "task", "metric", "unit", "profile", "decoder", "source", "where", "note")
"""What a row says of its claim as the ledger has it."""
STATES = ("num_fewshot", "max_new_tokens", "chat")
"""Settings of a claim's own run that are part of the convention it states."""


@dataclass(frozen=True)
class Place:
    """Where weights and data are. models: a folder of model folders.  code: whether downloaded weights may have code
    that they write run where nothing isolates it.
    """

    models: Path
    data_dir: str | None = None
    code: bool = False

    def model(self, system: System) -> str | None:
        """The folder or hub id that a system's weights load from, None where they are nowhere."""
        for folder in (self.models / system.weights, self.bundled(system)):
            if folder.is_dir():
                return str(folder)
        return system.hub if system.hub and _hub() else None

    def may_run_code(self, system: System) -> bool:
        """Whether code may run without isolation."""
        return self.code or self.bundled(system).is_dir()

    def bundled(self, system: System) -> Path:
        """Where a system's weights are if they come with this package."""
        return resource("checkpoints") / system.weights


@dataclass(frozen=True)
class Row:
    """A claim and what became of it.

    judged: its verdict; "" until the whole table is.  measured: with its 95% interval, shares for scores, else in the
    claim's unit; None where nothing was run.  as_stated: by the convention that the claim states.  protocol: what it
    was measured under, "name hash".  run: the folder.  taken: when that run was begun, and at which commit of this
    package: `started`, `commit`, `dirty`, `version`.
    """

    claim: Claim
    judged: Judgement
    measured: Interval | None = None
    as_stated: bool = True
    protocol: str | None = None
    run: Path | None = None
    taken: Nested | None = None

    def to_dict(self) -> Nested:
        """As claims.json holds it."""
        claim, found = self.claim, self.measured
        return {
            **{name: getattr(claim, name) for name in CELL},
            "published": claim.value,
            "published_to": claim.to,
            "decimals": claim.decimals,
            "measured": found and {"score": found.mean, **{k: v for k, v in found.to_dict().items() if k != "mean"}},
            "convention": {"published": claim.stated, "measured": self.protocol},
            "verdict": self.judged.verdict,
            "margin": self.judged.margin,
            "p": {"within": self.judged.p_within, "beyond": self.judged.p_beyond},
            "run": None if self.run is None else str(self.run),
            "taken": self.taken,
        }


def reproduce(
    ledger: Ledger,
    claims: Sequence[Claim],
    out: Path,
    place: Place,
    *,
    resume: bool = False,
    margins: Margins | None = None,
) -> Nested:
    """Measure those of the claims that can be; returns what claims.json holds: their rows, how many claims are others'
    and how many of those were measured, the linter's findings, and the sources.

    Run folders are kept below `out`: replaced, or gone on with if `resume`, where what is finished is not measured
    again. The whole ledger is linted, whichever claims are measured.
    """
    if not _hub():
        datasets.go_offline()  # before anything imports the hub's clients, which would ask again and again
    rows: dict[int, Row] = {}
    groups: dict[str, list[int]] = {}
    for number, claim in enumerate(claims):
        system = ledger.systems[claim.system]
        if needs := missing(claim, run_settings(claim, ledger), place, system):
            rows[number] = not_run(claim, f"needs {', '.join(needs)}")
        else:
            values = json.dumps(run_values(claim, ledger, place), sort_keys=True, default=str)
            groups.setdefault(values, []).append(number)
    specs: list[tuple[RunSpec, list[int]]] = []
    for values, numbers in groups.items():  # all of them before the first run: a slip is told at once
        tasks = list(lm_eval_tasks.outermost(claims[number].task for number in numbers))
        try:
            specs.append((build_spec(chat_of({**json.loads(values), "tasks": tasks})), numbers))
        except ConfigError as error:
            print(f"{claims[numbers[0]].cell}: {error}", file=sys.stderr)
            rows |= {number: not_run(claims[number], str(error)) for number in numbers}
    for done, (spec, numbers) in enumerate(specs, 1):
        print(f"run {done} of {len(specs)}: {claims[numbers[0]].system}", file=sys.stderr)
        measured = measure(spec, [claims[number] for number in numbers], out, resume=resume)
        rows |= dict(zip(numbers, measured, strict=True))
    settled = settle(ledger, [rows[number] for number in range(len(claims))], margins)
    external = [claim for claim in ledger.claims if not ledger.ours(claim)]
    found = {
        "rows": [row.to_dict() for row in settled],
        "external": {
            "claims": len(external),
            "measured": sum(row.measured is not None and not ledger.ours(row.claim) for row in settled),
        },
        "lint": [asdict(clash) for clash in lint(ledger)],
        "sources": {claim.source: ledger.sources[claim.source].cite for claim in claims},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CLAIMS, found)
    return found


def settle(ledger: Ledger, rows: Sequence[Row], margins: Margins | None = None) -> list[Row]:
    """The rows with the verdicts of what was measured, which depend on how many there are."""
    found = {place: row.measured for place, row in enumerate(rows) if row.measured is not None}
    findings = [
        Finding(rows[place].claim, measured, rows[place].as_stated, ledger.ours(rows[place].claim))
        for place, measured in found.items()
    ]
    judged = dict(zip(found, judge(findings, margins), strict=True))
    return [replace(row, judged=judged.get(place, row.judged)) for place, row in enumerate(rows)]


def not_run(claim: Claim, why: str, run: Path | None = None, taken: Nested | None = None) -> Row:
    """A claim of which nothing was measured."""
    return Row(claim, Judgement(f"{NOT_RUN}: {why}"), run=run, taken=taken)


def run_settings(claim: Claim, ledger: Ledger) -> Nested:
    """Settings of the run that measures a claim: the system's, the decoder's it means, its own."""
    means = ledger.decoders.get(claim.decoder)
    return {**ledger.systems[claim.system].run, **({"decoder": means.run} if means else {}), **claim.run}


def missing(claim: Claim, settings: Nested, place: Place, system: System) -> list[str]:
    """What would have to be here for the claim to be measured: what this package lacks, else what this machine does."""
    decoder = settings.get("decoder", "ar")
    decoder = decoder.get("name", "ar") if isinstance(decoder, dict) else decoder
    if decoder not in DECODERS:
        return [f"decoder {decoder}"]
    if claim.task not in lm_eval_tasks.known_tasks():
        return [f"task {claim.task}"]
    if claim.unit == "times":
        return ["the system it is faster than"]
    if claim.unit != "%" and not lm_eval_tasks.writes(claim.task):
        return [f"a form of {claim.task} with written answers (here it is scored by likelihood)"]
    needs = []
    if place.model(system) is None:
        needs.append(f"weights {system.weights}/")
    if system.device == "cuda" and not _cuda():
        needs.append("a CUDA device")
    if claim.unit == "tok/s" and not (claim.hardware and claim.hardware in _cuda()):
        needs.append(claim.hardware or "the hardware it was measured on, which is not stated")
    if lm_eval_tasks.unsafe_names((claim.task,)) and not place.may_run_code(system) and isolation().name is None:
        needs.append("--allow-unsafe-code")
    source = next((name for name in datasets.DATASETS if claim.task == name or claim.task.startswith(name + "_")), None)
    if source is not None and not _at_hand(source, place.data_dir):
        needs.append(f"data {source}")
    return needs


def run_values(claim: Claim, ledger: Ledger, place: Place) -> Nested:
    """All values of the run that measures a claim, tasks apart."""
    system = ledger.systems[claim.system]
    return {
        "profile": claim.profile or DEFAULT_PROFILE,
        **run_settings(claim, ledger),
        "model": str(place.model(system)),
        "data_dir": place.data_dir,
        "allow_unsafe_code": place.may_run_code(system),
    }


def measure(spec: RunSpec, claims: Sequence[Claim], out: Path, *, resume: bool = False) -> list[Row]:
    """Run what these claims share. A run that fails leaves its claims unmeasured, with the reason.

    What an earlier run of the same spec left below `out` is removed first, or gone on with if `resume`; a folder that
    holds other files beside is left alone.
    """
    folder = out / default_folder(spec).name
    try:
        if not resume and held_spec(folder) is not None:
            replace_folder.check_ours("out", folder, RUN_FILES)
            replace_folder.remove(folder, RUN_FILES)
        times = SPEED_REPEATS if any(claim.unit == "tok/s" for claim in claims) else 0
        result = run(spec, folder, resume=resume, speed_repeats=times)
    except (ConfigError, RunError, OSError) as error:
        return [not_run(claim, str(error)) for claim in claims]
    taken = _taken(folder)
    used = result.get("protocol")  # none in folders from before there were any
    told = f"{used['name']} {used['hash']}" if used else None
    rows = []
    for claim in claims:
        try:
            found = _score(claim, result) if claim.unit == "%" else _speed(claim, folder)
            stated = as_stated(claim, spec, result)
        except ConfigError as error:
            rows.append(not_run(claim, str(error), folder, taken))
        else:
            rows.append(Row(claim, Judgement(""), found, stated, told, folder, taken))
    return rows


def as_stated(claim: Claim, spec: RunSpec, result: Nested) -> bool:
    """Whether a run asked and read as the claim states: by what the result says it did, not by a profile's name.

    A claim that states nothing is held against whatever was run; one that states it in words alone, against nothing.
    """
    if not claim.profile:
        return not claim.convention
    if (used := result.get("protocol")) is None:
        return False
    values = {"profile": claim.profile, **{name: claim.run[name] for name in STATES if name in claim.run}}
    wanted = build_spec(chat_of({**values, "tasks": list(spec.tasks), "model": spec.model.path}))
    chat = result.get("chat") if wanted.chat == spec.chat else wanted.chat and asdict(wanted.chat)
    built = json.dumps(replace(wanted, data_dir=spec.data_dir).to_dict(), sort_keys=True)
    return bool(_expected(built, json.dumps(chat)) == used["hash"])


@cache
def _expected(values: str, chat: str) -> str:
    """The hash of a protocol as its tasks are built here and now. values, chat: a spec's, a conversation's, as JSON."""
    spec = build_spec(json.loads(values))
    tasks = lm_eval_tasks.load_tasks(spec)
    members = {name: lm_eval_tasks.members(tasks, name) for name in spec.tasks}
    return str(protocol.describe(spec, tasks["tasks"], members, json.loads(chat))["hash"])


def _taken(folder: Path) -> Nested:
    """When a run was begun, and by which state of this package."""
    where = read_json(folder / ENVIRONMENT)
    return {"started": where["started"], "version": where["versions"]["fluid-eval"], **where["git"]}


def _score(claim: Claim, result: Nested) -> Interval:
    """A claim's metric in a result, of its tasks or their parts."""
    metric, _, used = claim.metric.partition(",")
    for line in [*result["lines"], *result["parts"]]:
        if (line["task"], line["metric"]) == (claim.task, metric) and used in ("", line["filter"]):
            return Interval(line["score"], line["low"], line["high"], line["n"])
    known = {f"{line['metric']},{line['filter']}" for line in result["lines"] if line["task"] == claim.task}
    raise ConfigError(f"its task has no metric {claim.metric!r}; known: {', '.join(sorted(known))}")


def _speed(claim: Claim, folder: Path) -> Interval:
    """Tokens a second, a forward or a round of the written answers of a task, or of all tasks of a group."""
    leaves = lm_eval_tasks.inside(claim.task) or {claim.task}
    records = in_order(
        (r for r in read_samples(folder) if r["task"] in leaves and r["finish"] is not None and "lost" not in r),
        sorted(leaves),
    )
    found = None
    if records:
        over, under = zip(*(_parts(claim, record) for record in records), strict=True)
        found = ratio_of_sums([over], [under], list(Counter(record["task"] for record in records).values()))
    if found is None:
        raise ConfigError(f"its run wrote nothing to measure {claim.metric} by")
    if claim.unit == "tok/s":
        again = list(speed_repeats.tokens_per_second(records, speed_repeats.read(folder)).values())
        found = geometric(again) if again else Interval(found.mean, math.nan, math.nan, found.n)
    return found


def _parts(claim: Claim, record: Record) -> tuple[float, float]:
    """What a speed's ratio is of, in one answer."""
    trace = record["trace"]
    if claim.unit == "tok/round":
        accepted = trace.get("accepted") or []
        return sum(accepted), len(accepted)
    spent = record["seconds"] if claim.unit == "tok/s" else sum(trace["forwards"].values())
    return len(record["output_ids"]), spent


@cache
def _hub() -> bool:
    return datasets.hub_reachable()


@cache
def _cuda() -> str:
    """The CUDA device's name, empty without one."""
    from fluid_model.checkpoints.checkpoint import device_name

    return device_name()


@cache
def _at_hand(source: str, data_dir: str | None) -> bool:
    """Whether a benchmark's rows can be had; a hub that answers is trusted to hold them."""
    if data_dir is None and source != "humaneval" and _hub():
        return True
    try:
        return all(datasets.load_rows(source, split, data_dir) for split in datasets.DATASETS[source].known)
    except ConfigError:
        return False
