"""One self-contained HTML page from a run folder. Reads the store alone: no torch, no lm-eval, no network.

What a model wrote is hostile until shown otherwise: in the page's text it is escaped by Jinja, in the samples' JSON
block no character is left that HTML could read, and the page's script only ever sets text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluid_model.engine.records import KINDS
from fluid_model.errors import ConfigError
from fluid_model.files import read_json

from .paths import resource
from .plots import score_speed, tokens_per_forward
from .show import number, score
from .store import ENVIRONMENT, RESULT, SAMPLES, SPEC, Record, read_samples

Nested = dict[str, Any]
TEMPLATE = "report.html.j2"
MOST_SAMPLES = 2000
"""Samples a page holds at most; a browser searches that many without a pause."""
PAGE_BYTES = 5_000_000
"""What the samples may take in a page before their texts are cut shorter."""
CLIPS = (6000, 3000, 1500, 750)
"""Characters kept of a text, the longest that fits PAGE_BYTES; what is left out is left out of its middle."""
SHARED_LEAST = 200
"""A beginning that all prompts of a task share (few-shot examples) is stored once from this length on."""
_THINKING = {True: "ended", False: "never ended", None: None}
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def write_report(folder: Path, output: Path) -> None:
    """Write the page of a finished run, all or nothing.

    Raises ConfigError if the folder holds no run or an unfinished one, or `output` cannot be written.
    """
    if not (folder / SPEC).is_file():
        raise ConfigError(f"{folder}: no run here (no {SPEC}); name the folder that fluid-eval run --out wrote")
    if not (folder / RESULT).is_file():
        raise ConfigError(f"{folder}: this run is not finished (no {RESULT}); run it again with --resume first")
    spec, result = read_json(folder / SPEC), read_json(folder / RESULT)
    missing = {
        "model",
        "decoder",
        "started",
        "wall_seconds",
        "lines",
        "members",
        "parts",
        "data",
        "notices",
    } - result.keys()
    if missing:
        raise ConfigError(f"{folder / RESULT}: lacks {', '.join(sorted(missing))}; run again into another --out")
    environment = read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).is_file() else {}
    records = list(read_samples(folder))
    _check_whole(folder, result, records)
    page = _render(spec, result, environment, records)
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; pass -o FILE")
    draft = output.with_name(f".{output.name}.tmp")
    try:
        # lone surrogates, which a model can write, exist in no encoding
        draft.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(draft, output)
    except OSError as error:
        with suppress(OSError):  # there may be none
            draft.unlink()
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); pass another -o FILE") from error


def _check_whole(folder: Path, result: Nested, records: Sequence[Record]) -> None:
    """Raise ConfigError if the samples are not those the result was made from."""
    owners = {leaf: name for name, leaves in result["members"].items() for leaf in leaves}
    found = Counter(owners.get(record["task"]) for record in records)
    for line in result["lines"]:
        if found[line["task"]] < line["n"]:
            raise ConfigError(
                f"{folder / SAMPLES}: {found[line['task']]} samples of {line['task']}, the result has {line['n']}; "
                "run it again into another --out"
            )
    if None in found:
        raise ConfigError(f"{folder / SAMPLES}: holds samples of tasks that the result does not have")


def _render(spec: Nested, result: Nested, environment: Nested, records: list[Record]) -> str:
    import jinja2
    from markupsafe import Markup

    house = jinja2.Environment(
        loader=jinja2.FileSystemLoader(resource("reports")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    house.filters |= {"score": score, "number": number, "value": _value, "digest": _digest}
    owners = {leaf: name for name, leaves in result["members"].items() for leaf in leaves}
    shown = select(records, owners)
    block, clip = _samples_block(shown, owners)
    return house.get_template(TEMPLATE).render(
        model=Path(result["model"].rstrip("/")).name,
        spec=spec,
        settings=dict(_flat({k: v for k, v in spec.items() if k != "id"})),
        result=result,
        wall=_duration(result["wall_seconds"]),
        decoder={k: v for k, v in result["decoder"].items() if k != "name"},
        chat={k: v for k, v in (result.get("chat") or {}).items() if v not in (None, "", {})},
        warnings=[m for m in result["data"] if m.startswith("WARNING")],
        figures=[Markup(svg) for svg in (score_speed(result["lines"]), tokens_per_forward(result["lines"])) if svg],
        kinds=[kind for kind in KINDS if any(line.get("forwards_by_kind", {}).get(kind) for line in result["lines"])],
        environment=_environment(environment),
        versions=environment.get("versions", {}),
        of=len(records),
        shares=_shares(records, shown, owners),
        most=MOST_SAMPLES,
        clip=clip,
        samples=Markup(block),
    )


def select(records: Sequence[Record], owners: Mapping[str, str]) -> list[Record]:
    """The samples a page shows: all, or MOST_SAMPLES of them, evenly spaced in file order and whatever their score.

    owners: leaf task -> task of the spec.  Each task of the spec (a group counts as one) gets an equal share, and
    passes on what it does not need. So right and wrong answers stand in a task's selection about as in the run.
    """
    if len(records) <= MOST_SAMPLES:
        return list(records)
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(owners[record["task"]], []).append(record)
    room, keep = MOST_SAMPLES, set()
    for place, group in enumerate(sorted(by_task.values(), key=len)):
        share = min(len(group), room // (len(by_task) - place))
        keep |= {id(group[i * len(group) // share]) for i in range(share)}
        room -= share
    return [record for record in records if id(record) in keep]


def _shares(
    records: Sequence[Record], shown: Sequence[Record], owners: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Per task of the spec: samples shown, samples there are."""
    ours = Counter(owners[record["task"]] for record in shown)
    everything = Counter(owners[record["task"]] for record in records)
    return {name: (ours[name], count) for name, count in everything.items()}


def _samples_block(records: Sequence[Record], owners: Mapping[str, str]) -> tuple[str, int]:
    """The samples as JSON that is safe inside <script>, and how many characters of a text it keeps."""
    shared = _shared_beginnings(records)
    for clip in CLIPS:
        block = _safe_json(
            {
                "tasks": [
                    {"name": name, "owner": owners[name], "shared": _clip(text, CLIPS[0])}
                    for name, text in shared.items()
                ],
                "samples": [_sample(record, shared, clip) for record in records],
            }
        )
        if len(block.encode()) <= PAGE_BYTES:
            break
    return block, clip


def _shared_beginnings(records: Sequence[Record]) -> dict[str, str]:
    """Leaf task -> the whole lines that all its prompts begin with; empty if they are few."""
    prompts: dict[str, list[str]] = {}
    for record in records:
        prompts.setdefault(record["task"], []).append(record["prompt"])
    found = {}
    for task, texts in prompts.items():
        # what the first and the last in order share, all between them share
        same = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071  letters are meant
        same = same[: same.rfind("\n") + 1]
        found[task] = same if len(texts) > 1 and len(same) >= SHARED_LEAST else ""
    return found


def _sample(record: Record, shared: Mapping[str, str], clip: int) -> Nested:
    """What the page shows of a sample; what is empty is left out."""
    trace = record.get("trace") or {}
    task = record["task"]
    values = {
        "key": record["key"],
        "task": list(shared).index(task),
        "prompt": _clip(record["prompt"][len(shared[task]) :], clip),
        "promptTokens": record.get("prompt_tokens"),
        "cut": record.get("truncated") or None,
        "output": _clip(record["output"], clip),
        "raw": _clip(record["raw_output"], clip) if record.get("raw_output") else None,
        "thinking": _THINKING[record.get("thinking_ended")],
        "tokens": len(record.get("output_ids") or []) or None,
        "finish": record.get("finish"),
        "extracted": {name: _clip(text, clip // 2) for name, text in (record.get("extracted") or {}).items()},
        "target": _clip(str(record.get("target") or ""), clip // 2),
        "scores": {name: _finite(value) for name, value in (record.get("scores") or {}).items()},
        "forwards": {kind: count for kind, count in trace.get("forwards", {}).items() if count},
        "predicted": trace.get("predicted"),
        "accepted": trace.get("accepted"),
        "choices": record.get("choices"),
        "loglikelihoods": [_finite(value) for value in record.get("loglikelihoods") or []],
        "errors": [value if value is None else _finite(value) for value in record.get("standard_errors") or []],
        "seconds": _finite(record.get("seconds", math.nan)),
    }
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _clip(text: str, most: int) -> str | list[str | int]:
    """A text, or [its beginning, how many characters are left out, its end] if it has more than `most`."""
    if len(text) <= most:
        return text
    half = most // 2
    return [text[:half], len(text) - 2 * half, text[-half:]]


def _safe_json(values: Any) -> str:
    """JSON that ends no <script> and opens no comment: what HTML or JavaScript could read is escaped."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: float) -> float | str:
    """A number with five digits after the point, or its name where JSON has none."""
    return round(value, 5) if math.isfinite(value) else str(value)


def _environment(values: Nested) -> dict[str, Any]:
    """Rows of the environment's table."""
    git, engine = values.get("git", {}), values.get("engine", {})
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[git.get("dirty")]
    memory = values.get("memory_bytes")
    rows = {
        "command": shlex.join(values.get("command", [])),
        "commit": f"{git['commit']}, {state}" if git.get("commit") else None,
        "device": engine.get("device"),
        "dtype": engine.get("dtype"),
        "workers": engine.get("workers"),
        "threads per worker": engine.get("threads"),
        "parameters": number(engine.get("parameters")),
        "code isolation": values.get("isolation"),
        "python": values.get("python"),
        "platform": values.get("platform"),
        "processor": values.get("processor"),
        "CPUs": values.get("cpus"),
        "memory": memory and f"{memory / 2**30:.1f} GiB",
    }
    for data in values.get("data", []):
        rows[f"data {data['dataset']} {data['split']}"] = f"{data['rows']:,} rows, sha256 {data['sha256'][:16]}…"
    return rows


def _flat(values: Nested, where: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{name}.")
        else:
            yield where + name, value


def _value(value: Any) -> str:
    """A setting as a reader expects it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _digest(script: str) -> str:
    """The page's only script by its hash: its content security policy lets no other run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
