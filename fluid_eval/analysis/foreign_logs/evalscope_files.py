"""EvalScope's logs: reviews/MODEL/BENCHMARK_SUBSET.jsonl, and predictions/MODEL/… of the same name beside them.

Format: EvalScope 1.x, evalscope/api/evaluator/cache.py (ModelResult, ReviewResult) and api/metric/scorer.py. A review
has the scores; a prediction has the answer's usage and how it ended. Either is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .logs import ForeignLog, ForeignSample, conversation, message_text, read_rows, read_samples

HARNESS = "EvalScope"
REVIEW, PREDICTION = {"index", "sample_score"}, {"index", "model_output"}
"""Fields of every line."""
_FINISH = {"stop": "stop", "max_tokens": "length", "model_length": "length"}


def reviews_of(prediction: Path) -> Path:
    """The reviews of a predictions file, where EvalScope puts them."""
    return prediction.parents[2] / "reviews" / prediction.parent.name / prediction.name


def read(file: Path) -> ForeignLog:
    """One file of reviews or predictions. Raises ConfigError naming the line that cannot be read."""
    predictions = file.parents[2] / "predictions" / file.parent.name / file.name if len(file.parents) > 2 else file
    rows = read_rows(predictions) if predictions != file and predictions.is_file() else iter(())
    outputs = {row["index"]: row for _, row in rows if row.keys() >= PREDICTION}

    def sample(where: str, row: Any) -> ForeignSample:
        return _sample(where, row, row if row.keys() >= PREDICTION else outputs.get(row["index"]))

    samples = read_samples(read_rows(file), HARNESS, sample)
    return ForeignLog(
        file=file, harness=HARNESS, task=file.name.split(".jsonl")[0], model=file.parent.name, samples=samples,
        backend=HARNESS.lower(), chat=True,
    )  # fmt: skip


def _sample(where: str, row: Mapping[str, Any], prediction: Mapping[str, Any] | None) -> ForeignSample:
    """A sample of a review (or a prediction alone). prediction: of the same document, if any."""
    score = row["sample_score"]["score"] if "sample_score" in row else {}
    output = (prediction or {}).get("model_output") or {}
    choice = (output.get("choices") or [{}])[0]
    usage = output.get("usage") or {}
    has_usage = bool(usage.get("total_tokens"))  # zeros are its default
    text = message_text(choice["message"]["content"]) if choice else score["prediction"]
    messages = [m for m in (prediction or {}).get("messages") or () if m.get("role") != "assistant"]
    extracted = score.get("extracted_prediction")
    return ForeignSample(
        where=where,
        document=int(row["index"]),
        prompt=conversation(messages or row["input"]),
        output=str(text),
        target=row.get("target"),
        scores={f"{name},none": float(value) for name, value in (score.get("value") or {}).items()},
        extracted={} if extracted is None else {"none": str(extracted)},
        finish=_FINISH.get(choice.get("stop_reason", ""), "unknown"),
        tokens=int(usage["output_tokens"]) if has_usage else None,
        failure=output.get("error") or None,
    )
