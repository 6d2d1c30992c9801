"""lm-eval's `--log_samples` files: samples_TASK_DATE.jsonl, and results_DATE.json beside them where it was kept.

Format: lm-eval 0.4.13, lm_eval/loggers/evaluation_tracker.py and evaluator.py; older 0.4 files have the same fields. A
document has a line for each filter. Seconds are those of the whole evaluation, so answers have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested, read_json

from .logs import ForeignLog, ForeignSample, read_rows

HARNESS = "lm-eval"
ROW = {"doc_id", "arguments", "resps"}
"""Fields of every line."""
_NAME = re.compile(r"samples_(?P<task>.+?)(?:_(?P<date>\d{4}-\d\d-\d\dT[\d.-]+))?\.jsonl(?:\.gz)?")


def samples_beside(results: Path) -> list[Path]:
    """The samples files of a results file. Raises ConfigError if there are none."""
    date = results.stem.removeprefix("results_")
    samples = sorted(results.parent.glob(f"samples_*_{date}.jsonl"))
    if not samples:
        raise ConfigError(f"{results}: no samples beside it; lm-eval writes them with --log_samples")
    return samples


def read(file: Path) -> ForeignLog:
    """One samples file. Raises ConfigError naming the line that cannot be read."""
    # 1) what the results file says of the model and the task
    name = _NAME.fullmatch(file.name)
    task, date = (name["task"], name["date"]) if name else (file.name.split(".")[0], None)
    beside = file.with_name(f"results_{date}.json")
    results = read_json(beside) if date and beside.is_file() else {}
    config, about = results.get("config") or {}, (results.get("configs") or {}).get(task) or {}
    # 2) the samples
    filters: dict[int, dict[str, Any]] = {}
    first: dict[int, tuple[str, Any]] = {}
    for where, row in read_rows(file):
        if missing := sorted(ROW - row.keys()):
            raise ConfigError(f"{where}: no sample as {HARNESS} writes it (no {', '.join(missing)})")
        document, filtered = row["doc_id"], row.get("filter", "none")
        seen = filters.setdefault(document, {})
        if filtered in seen:
            raise ConfigError(f"{where}: document {document} is there twice under filter {filtered}; keep one of them")
        seen[filtered] = row
        first.setdefault(document, (where, row))
    samples = []
    for document, (where, row) in first.items():
        try:
            samples.append(_sample(where, row, filters[document]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"{where}: no sample as {HARNESS} writes it ({type(error).__name__}: {error})") from error
    # 3) the protocol
    options = [row["arguments"]["gen_args_0"].get("arg_1") for _, row in first.values()]
    kwargs = options[0] if options and isinstance(options[0], dict) else {}
    answers = max((len(row["resps"][0]) for _, row in first.values() if isinstance(row["resps"][0], list)), default=1)
    limit = config.get("limit")
    return ForeignLog(
        file=file, harness=HARNESS, task=task, model=_model(results, config), samples=samples,
        backend=str(config.get("model") or HARNESS), args=_args(config), version=results.get("lm_eval_version"),
        started=_started(results), seconds=_seconds(results),
        settings=_settings(about, kwargs, results, task),
        sampled=bool(kwargs.get("do_sample") and kwargs.get("temperature", 1.0)) if kwargs else False,
        chat=bool(results.get("chat_template_sha") or results.get("chat_template")),
        limit=int(limit) if limit and limit >= 1 else None, groups=results.get("group_subtasks") or {},
        notices=[f"{task}: {answers} answers a document in the log; the first is kept"] if answers > 1 else [],
    )  # fmt: skip


def _sample(where: str, row: Nested, by_filter: Mapping[str, Nested]) -> ForeignSample:
    """The sample of a document. by_filter: its lines."""
    arguments = [row["arguments"][f"gen_args_{n}"] for n in range(len(row["arguments"]))]
    prompt, target = _prompt(arguments[0]["arg_0"]), row.get("target")
    scores = {
        f"{metric},{name}": float(line[metric])
        for name, line in by_filter.items()
        for metric in line.get("metrics", ())
        if isinstance(line.get(metric), int | float)
    }
    known: Nested = {"prompt": prompt, "target": None if target is None else str(target), "scores": scores}
    # 1) a generated answer
    if isinstance(arguments[0].get("arg_1"), dict):
        extracted = {name: _text(line["filtered_resps"]) for name, line in by_filter.items()}
        return ForeignSample(where, row["doc_id"], output=_text(row["resps"][0]), extracted=extracted, **known)
    # 2) choices by likelihood; a whole text is one of them
    pairs = [_pair(answer[0]) for answer in row["resps"]]
    choices = [str(one.get("arg_1", "")) for one in arguments]
    values = [value for value, _ in pairs]
    best = choices[max(range(len(values)), key=values.__getitem__)].strip()
    return ForeignSample(
        where, row["doc_id"], output=best, finish=None, choices=choices, loglikelihoods=values,
        greedy=[greedy for _, greedy in pairs], extracted=dict.fromkeys(by_filter, best), **known,
    )  # fmt: skip


def _prompt(argument: Any) -> str:
    """A prompt's text; of a chat for a server, its messages as JSON."""
    return str(argument[0] if isinstance(argument, list) else argument)


def _text(answers: Any) -> str:
    """The first answer."""
    while isinstance(answers, list):
        answers = answers[0] if answers else ""
    return str(answers)


def _pair(answer: Any) -> tuple[float, bool]:
    """(log-likelihood, is greedy), which lm-eval writes as texts."""
    if isinstance(answer, list):
        return float(answer[0]), str(answer[1]) == "True"
    return float(answer), False


def _model(results: Nested, config: Nested) -> str | None:
    name = results.get("model_name") or _args(config, drop=()).get("pretrained")
    return None if name is None else str(name)


def _args(config: Nested, drop: tuple[str, ...] = ("pretrained", "model")) -> Nested:
    """--model_args, which older files have as one text."""
    args = config.get("model_args") or {}
    if isinstance(args, str):
        args = dict(pair.split("=", 1) for pair in args.split(",") if "=" in pair)
    return {name: value for name, value in args.items() if name not in drop}


def _settings(about: Nested, kwargs: Nested, results: Nested, task: str) -> Nested:
    """What the log says of the protocol, in the words of a run's own."""
    settings: Nested = {"version": results.get("versions", {}).get(task)} if "versions" in results else {}
    if about:
        settings["num_fewshot"] = about.get("num_fewshot") or 0
        if filters := about.get("filter_list"):
            settings["extractors"] = {one["name"]: json.dumps(one["filter"]) for one in filters}
        if metrics := about.get("metric_list"):
            settings["metrics"] = metrics
    if kwargs:
        until = kwargs.get("until")
        settings["until"] = [until] if isinstance(until, str) else list(until or [])
        settings["max_gen_toks"] = kwargs.get("max_gen_toks")
    return settings


def _started(results: Nested) -> str | None:
    date = results.get("date")
    if not isinstance(date, int | float):
        return None
    return datetime.fromtimestamp(date, UTC).isoformat(timespec="seconds")


def _seconds(results: Nested) -> float | None:
    try:
        return float(results["total_evaluation_time_seconds"])
    except (KeyError, TypeError, ValueError):
        return None
