"""Measures the claims of the ledger that this machine can, and judges them: `fluid-eval reproduce`.

Claims that share weights, settings and convention share a run. A claim that cannot be measured here names what it
needs; a published number never stands in for a measured one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from fluid_model.common import replace_folder
from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested, read_json
from fluid_model.registry import decoders

from ..benchmarks import datasets, lm_eval_tasks
from ..benchmarks import profiles as protocol
from ..benchmarks.profiles import chat_of
from ..benchmarks.task_index import catalogue, of_this_package
from ..common.paths import resource
from ..common.spec import DEFAULT_PROFILE, RunSpec, build_spec
from ..common.stats import Interval, geometric, ratio_of_sums
from ..results import speed_repeats
from ..results.run_folder import ENVIRONMENT, RUN_FILES, Record, held_spec, read_samples, write_json
from ..results.sample_records import in_order
from ..running.job import default_folder, run
from ..sandbox.ladder import strongest_tier as isolation
from .conflicts import find_conflicts
from .ledger import Claim, Ledger, System
from .verdicts import NOT_RUN, Finding, Judgement, Margins, judge

CLAIMS = "claims.json"
SPEED_REPEATS = 5
"""Speed repeats of runs that measure claims in tokens/s."""
LEDGER_FIELDS = ("table", "system", "task", "metric", "unit", "profile", "decoder", "source", "where", "note")
"""Fields of a claim that its entry in claims.json repeats."""
CONVENTION_SETTINGS = ("num_fewshot", "max_new_tokens", "chat")
"""Settings of a claim's own run that belong to the convention it states."""


@dataclass(frozen=True)
class Resources:
    """Where weights and data are on this machine.

    models: a folder of model folders.  data_dir: benchmark data, None for the hub.
    code: whether code that downloaded weights generate may run without isolation.
    """

    models: Path
    data_dir: str | None = None
    code: bool = False

    def model(self, system: System) -> str | None:
        """The folder, packaged model or hub id that a system's weights load from, None if they are not available."""
        from fluid_model.checkpoints.gguf_files import is_installed

        for folder in (self.models / system.weights, self.bundled(system)):
            if folder.is_dir():
                return str(folder)
        if is_installed(system.weights):
            return system.weights
        return system.hub if system.hub and _hub() else None

    def may_run_code(self, system: System) -> bool:
        """Whether generated code may run without isolation."""
        return self.code or self.bundled(system).is_dir()

    def bundled(self, system: System) -> Path:
        """The folder of a system's weights if they come with this package."""
        return resource("checkpoints") / system.weights


@dataclass(frozen=True)
class MeasuredClaim:
    """A claim with its measurement and verdict.

    judged: the verdict, "" until the whole table is judged.
    measured: with its 95% interval; a share for scores, else in the claim's unit. None where nothing was run.
    as_stated: measured by the convention that the claim states.  protocol: of the measurement, "name hash".
    run: the run folder.  taken: start and code version of that run: `started`, `commit`, `dirty`, `version`.
    """

    claim: Claim
    judged: Judgement
    measured: Interval | None = None
    as_stated: bool = True
    protocol: str | None = None
    run: Path | None = None
    taken: Nested | None = None

    def to_dict(self) -> Nested:
        """The claim's entry in claims.json."""
        claim, score = self.claim, self.measured
        return {
            **{name: getattr(claim, name) for name in LEDGER_FIELDS},
            "published": claim.value,
            "published_to": claim.to,
            "decimals": claim.decimals,
            "measured": score and {"score": score.mean, **{k: v for k, v in score.to_dict().items() if k != "mean"}},
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
    resources: Resources,
    *,
    resume: bool = False,
    margins: Margins | None = None,
) -> Nested:
    """Measure and judge claims. Returns the content of claims.json: rows, counts, conflicts and sources.

    Run folders are kept below `out`. They are replaced, or continued if `resume`; then finished runs are not measured
    again. Conflicts are searched in the whole ledger, whichever claims are measured.
    """
    if not _hub():
        datasets.go_offline()  # before anything imports the hub's clients, which would retry at length
    # 1) claims that can be measured here, grouped by equal settings
    rows: dict[int, MeasuredClaim] = {}
    groups: dict[str, list[int]] = {}
    for number, claim in enumerate(claims):
        system = ledger.systems[claim.system]
        if needs := missing(claim, run_settings(claim, ledger), resources, system):
            rows[number] = not_run(claim, f"needs {', '.join(needs)}")
        else:
            values = json.dumps(run_values(claim, ledger, resources), sort_keys=True, default=str)
            groups.setdefault(values, []).append(number)
    # 2) a run for each group; all are built before the first starts, so that errors show at once
    specs: list[tuple[RunSpec, list[int]]] = []
    for values, numbers in groups.items():
        tasks = list(catalogue().outermost(claims[number].task for number in numbers))
        try:
            specs.append((build_spec(chat_of({**json.loads(values), "tasks": tasks})), numbers))
        except ConfigError as error:
            print(f"{claims[numbers[0]].cell}: {error}", file=sys.stderr)
            rows |= {number: not_run(claims[number], str(error)) for number in numbers}
    # 3) measure
    started = time.perf_counter()
    for done, (spec, numbers) in enumerate(specs):
        _announce(claims[numbers[0]].system, done, len(specs), time.perf_counter() - started)
        measured = measure(spec, [claims[number] for number in numbers], out, resume=resume)
        rows |= dict(zip(numbers, measured, strict=True))
    # 4) judge all together
    return conclude(ledger, [rows[number] for number in range(len(claims))], out, margins)


def conclude(ledger: Ledger, rows: Sequence[MeasuredClaim], out: Path, margins: Margins | None = None) -> Nested:
    """Judge the rows and write claims.json: rows, counts, conflicts and sources. Returns its content."""
    judged = judge_rows(ledger, rows, margins)
    external = [claim for claim in ledger.claims if not ledger.ours(claim)]
    result = {
        "rows": [row.to_dict() for row in judged],
        "external": {
            "claims": len(external),
            "measured": sum(row.measured is not None and not ledger.ours(row.claim) for row in judged),
        },
        "lint": [asdict(conflict) for conflict in find_conflicts(ledger)],
        "sources": {row.claim.source: ledger.sources[row.claim.source].cite for row in judged},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CLAIMS, result)
    return result


def _announce(system: str, done: int, runs: int, seconds: float) -> None:
    """Say which run begins, and how long the rest may take; before the first, what is to come. seconds: so far."""
    if not done:
        print(
            f"{runs} runs one after another: minutes for a small model, hours for a 7B;\n"
            "what is finished is kept, and --resume goes on",
            file=sys.stderr,
        )
    left = seconds / done * (runs - done) / 60 if done else 0
    about = f", about {left:.0f} min left" if left >= 1 else ""
    print(f"run {done + 1} of {runs}: {system}{about}", file=sys.stderr)


def judge_rows(ledger: Ledger, rows: Sequence[MeasuredClaim], margins: Margins | None = None) -> list[MeasuredClaim]:
    """The rows with verdicts on those that were measured. Verdicts depend on how many there are."""
    measured = {place: row.measured for place, row in enumerate(rows) if row.measured is not None}
    findings = [
        Finding(rows[place].claim, interval, rows[place].as_stated, ledger.ours(rows[place].claim))
        for place, interval in measured.items()
    ]
    judged = dict(zip(measured, judge(findings, margins), strict=True))
    return [replace(row, judged=judged.get(place, row.judged)) for place, row in enumerate(rows)]


def not_run(claim: Claim, reason: str, run: Path | None = None, taken: Nested | None = None) -> MeasuredClaim:
    """A claim that was not measured."""
    return MeasuredClaim(claim, Judgement(f"{NOT_RUN}: {reason}"), run=run, taken=taken)


def run_settings(claim: Claim, ledger: Ledger) -> Nested:
    """Settings of the run that measures a claim: the system's, then its decoder's, then its own."""
    decoder = ledger.decoders.get(claim.decoder)
    return {**ledger.systems[claim.system].run, **({"decoder": decoder.run} if decoder else {}), **claim.run}


def missing(claim: Claim, settings: Nested, resources: Resources, system: System) -> list[str]:
    """What measuring a claim needs and is not there: first of this package, else of this machine. Empty if nothing."""
    # 1) this package
    decoder = settings.get("decoder", "ar")
    decoder = decoder.get("name", "ar") if isinstance(decoder, dict) else decoder
    weights = [f"weights {system.weights}/"] if resources.model(system) is None else []
    if decoder not in decoders():
        return [f"decoder {decoder}", *weights]
    if claim.task not in of_this_package() and catalogue().find(claim.task) is None:
        return [f"task {claim.task}"]
    if claim.unit == "times":
        return ["the system it is faster than"]
    if claim.unit != "%" and not catalogue().writes(claim.task):
        return [f"a form of {claim.task} with written answers (here it is scored by likelihood)"]
    # 2) this machine: weights, device, permission, data
    needs = weights
    if system.device == "cuda" and not _cuda():
        needs.append("a CUDA device")
    if claim.unit == "tok/s" and not (claim.hardware and claim.hardware in _cuda()):
        needs.append(claim.hardware or "the hardware it was measured on, which is not stated")
    is_unsafe = catalogue().unsafe((claim.task,)) and not resources.may_run_code(system)
    if is_unsafe and isolation().name is None:
        needs.append("--allow-unsafe-code")
    if claim.task not in of_this_package():
        return needs if _hub() else [*needs, f"a hub for the data of {claim.task}"]
    source = next((name for name in datasets.DATASETS if claim.task == name or claim.task.startswith(name + "_")), None)
    if source is not None and not _at_hand(source, resources.data_dir):
        needs.append(f"data {source}")
    return needs


def run_values(claim: Claim, ledger: Ledger, resources: Resources) -> Nested:
    """All values of the run that measures a claim, except its tasks."""
    system = ledger.systems[claim.system]
    return {
        "profile": claim.profile or DEFAULT_PROFILE,
        **run_settings(claim, ledger),
        "model": str(resources.model(system)),
        "data_dir": resources.data_dir,
        "allow_unsafe_code": resources.may_run_code(system),
    }


def measure(spec: RunSpec, claims: Sequence[Claim], out: Path, *, resume: bool = False) -> list[MeasuredClaim]:
    """Run the spec that these claims share. A failed run leaves its claims unmeasured, with the reason.

    An earlier run of the same spec below `out` is removed first, or continued if `resume`. A folder with other files is
    left alone, and its claims are not measured.
    """
    # 1) run
    folder = out / default_folder(spec).name
    try:
        if not resume and held_spec(folder) is not None:
            replace_folder.check_ours("out", folder, RUN_FILES)
            replace_folder.remove(folder, RUN_FILES)
        repeats = SPEED_REPEATS if any(claim.unit == "tok/s" for claim in claims) else 0
        result = run(spec, folder, resume=resume, speed_repeats=repeats)
    except (ConfigError, RunError, OSError) as error:
        return [not_run(claim, str(error)) for claim in claims]
    # 2) each claim's number from its result
    taken = _taken(folder)
    used = result.get("protocol")  # None in folders from before there were protocols
    protocol_name = f"{used['name']} {used['hash']}" if used else None
    rows = []
    for claim in claims:
        try:
            measured = _score(claim, result) if claim.unit == "%" else _speed(claim, folder)
            stated = as_stated(claim, spec, result)
        except ConfigError as error:
            rows.append(not_run(claim, str(error), folder, taken))
        else:
            rows.append(MeasuredClaim(claim, Judgement(""), measured, stated, protocol_name, folder, taken))
    return rows


def as_stated(claim: Claim, spec: RunSpec, result: Nested) -> bool:
    """Whether a run followed the convention that a claim states, by the protocol in its result.

    A claim that states no convention accepts any run; one that states it in words alone accepts none.
    """
    if not claim.profile:
        return not claim.convention
    if (used := result.get("protocol")) is None:
        return False
    stated = {name: claim.run[name] for name in CONVENTION_SETTINGS if name in claim.run}
    values = {"profile": claim.profile, **stated, "tasks": list(spec.tasks), "model": spec.model.path}
    wanted = build_spec(chat_of(values))
    chat = result.get("chat") if wanted.chat == spec.chat else wanted.chat and asdict(wanted.chat)
    built = json.dumps(replace(wanted, data_dir=spec.data_dir).to_dict(), sort_keys=True)
    return bool(_protocol_hash(built, json.dumps(chat)) == used["hash"])


@cache
def _protocol_hash(values: str, chat: str) -> str:
    """The protocol hash of a spec with its tasks as they are now. values, chat: spec and chat settings, as JSON."""
    spec = build_spec(json.loads(values))
    tasks = lm_eval_tasks.load_tasks(spec)
    members = {name: lm_eval_tasks.members(tasks, name) for name in spec.tasks}
    return str(protocol.describe(spec, tasks["tasks"], members, json.loads(chat))["hash"])


def _taken(folder: Path) -> Nested:
    """When a run was started, and by which version of this package."""
    environment = read_json(folder / ENVIRONMENT)
    return {
        "started": environment["started"],
        "version": environment["versions"]["fluid-eval"],
        **environment["git"],
    }  # fmt: skip


def _score(claim: Claim, result: Nested) -> Interval:
    """A claim's metric in a result, of a task or of a group's member. Raises ConfigError if it has no such metric."""
    metric, _, wanted = claim.metric.partition(",")
    for line in [*result["lines"], *result["parts"]]:
        if (line["task"], line["metric"]) == (claim.task, metric) and wanted in ("", line["filter"]):
            return Interval(line["score"], line["low"], line["high"], line["n"])
    known = {f"{line['metric']},{line['filter']}" for line in result["lines"] if line["task"] == claim.task}
    raise ConfigError(f"its task has no metric {claim.metric!r}; known: {', '.join(sorted(known))}")


def _speed(claim: Claim, folder: Path) -> Interval:
    """Tokens a second, a forward or a step over the generated answers of a task, or of all tasks of a group."""
    # 1) generated answers, by task
    leaves = catalogue().inside(claim.task) or {claim.task}
    generated = (
        record
        for record in read_samples(folder)
        if record["task"] in leaves and record["finish"] is not None and "lost" not in record
    )
    records = in_order(generated, sorted(leaves))
    # 2) ratio of sums
    ratio = None
    if records:
        over, under = zip(*(_parts(claim, record) for record in records), strict=True)
        ratio = ratio_of_sums([over], [under], list(Counter(record["task"] for record in records).values()))
    if ratio is None:
        raise ConfigError(f"its run wrote nothing to measure {claim.metric} by")
    # 3) tokens/s have an interval only from speed repeats
    if claim.unit == "tok/s":
        repeats = list(speed_repeats.tokens_per_second(records, speed_repeats.read(folder)).values())
        ratio = geometric(repeats) if repeats else Interval(ratio.mean, math.nan, math.nan, ratio.n)
    return ratio


def _parts(claim: Claim, record: Record) -> tuple[float, float]:
    """(tokens, what they are counted by) of one answer: seconds, forwards or speculative steps."""
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
    """Whether a benchmark's data is available; a reachable hub is assumed to have it."""
    if data_dir is None and source != "humaneval" and _hub():
        return True
    try:
        return all(datasets.load_rows(source, split, data_dir) for split in datasets.DATASETS[source].known)
    except ConfigError:
        return False
