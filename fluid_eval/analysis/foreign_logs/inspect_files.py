"""inspect_ai's logs: NAME.json, and NAME.eval, which is a zip archive of header.json and samples/ID_epoch_N.json.

Format: inspect_ai 0.3, log version 2, inspect_ai/log/_log.py (EvalLog, EvalSample), as its documentation describes it.
Its library is not needed. Scores C, I, P and N count 1, 0, 0.5 and 0, as inspect_ai's own `value_to_float` does.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested, parse_json, read_json

from .logs import ForeignLog, ForeignSample, conversation, message_text, read_samples

HARNESS = "inspect_ai"
HEADER = {"status", "eval"}
"""Fields of every log's head."""
_GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
_FINISH = {"stop": "stop", "max_tokens": "length", "model_length": "length"}
_ATTACHED = "attachment://"


def read(file: Path) -> ForeignLog:
    """One log. Raises ConfigError if it has no samples, or naming the sample that cannot be read."""
    if file.suffix == ".eval":
        head, rows = _archive(file)
    else:
        head = read_json(file)
        rows = [(f"{file}, sample {row.get('id')}", row) for row in head.get("samples") or ()]
    if missing := sorted(HEADER - head.keys()):
        raise ConfigError(f"{file}: no log of {HARNESS} (no {', '.join(missing)})")
    if not rows:
        raise ConfigError(f"{file}: holds no samples; {HARNESS} leaves them out with --no-log-samples")
    about, notices = head["eval"], []
    if head["status"] != "success":
        notices.append(f"{file.name}: the log's status is {head['status']}; it may lack samples")
    samples = read_samples(iter(rows), HARNESS, _sample)
    temperature = (about.get("model_generate_config") or {}).get("temperature")
    return ForeignLog(
        file=file, harness=HARNESS, task=str(about["task"]).rsplit("/", 1)[-1], model=about.get("model"),
        samples=samples, backend=HARNESS, version=(about.get("packages") or {}).get(HARNESS),
        started=about.get("created"), sampled=None if temperature is None else temperature > 0, chat=True,
        notices=notices,
    )  # fmt: skip


def _archive(file: Path) -> tuple[Nested, list[tuple[str, Any]]]:
    """Head and samples of a .eval file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if "header.json" not in names:
                raise ConfigError(f"{file}: no header.json inside; the evaluation was not finished")
            head = parse_json(archive.read("header.json"))
            inside = [name for name in names if name.startswith("samples/") and name.endswith(".json")]
            return head, [(f"{file}, {name}", parse_json(archive.read(name))) for name in inside]
    except (zipfile.BadZipFile, ValueError) as error:
        raise ConfigError(f"{file}: no archive of {HARNESS}, perhaps cut short ({error})") from error
    except NotImplementedError as error:
        raise ConfigError(f"{file}: {error} here; `inspect log convert --to json` writes it plainly") from error


def _sample(where: str, row: Nested) -> ForeignSample:
    row = _resolved(row, row.get("attachments") or {})
    output, usage = row["output"], row["output"].get("usage") or {}
    choice = (output.get("choices") or [{}])[0]
    before = _before_the_answer(row.get("messages") or [])
    extracted = {name: score.get("answer") for name, score in (row.get("scores") or {}).items()}
    target = row["target"]
    failure = (row.get("error") or {}).get("message")
    return ForeignSample(
        where=where,
        document=row["id"],
        prompt=conversation(before or row["input"]),
        output=message_text(choice["message"]["content"]) if choice else str(output.get("completion", "")),
        target=target if isinstance(target, str) else "; ".join(target),
        scores=dict(_scores(row.get("scores") or {})),
        extracted={name: str(answer) for name, answer in extracted.items() if answer is not None},
        finish=_FINISH.get(choice.get("stop_reason", ""), "unknown"),
        tokens=int(usage["output_tokens"]) if usage.get("output_tokens") else None,
        failure=failure,
    )


def _before_the_answer(messages: list[Any]) -> list[Any]:
    """The messages up to the last one of the assistant."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: places[-1]] if places else messages


def _scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """("SCORER,none", value) of each score that is a number or a grade."""
    for name, score in scores.items():
        value = score["value"]
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, one in parts:
            number = _GRADES.get(one, math.nan) if isinstance(one, str) else one
            if isinstance(number, int | float) and math.isfinite(number):
                yield f"{name}{':' * bool(part)}{part},none", float(number)


def _resolved(value: Any, attachments: Mapping[str, str]) -> Any:
    """A sample with its long texts in place, which inspect_ai keeps apart."""
    if isinstance(value, str) and value.startswith(_ATTACHED):
        return attachments.get(value.removeprefix(_ATTACHED), value)
    if isinstance(value, list):
        return [_resolved(item, attachments) for item in value]
    if isinstance(value, dict):
        return {name: _resolved(item, attachments) for name, item in value.items() if name != "events"}
    return value
