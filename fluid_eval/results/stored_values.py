"""Schemas of spec.json, result.json, environment.json, audit.json and khead.json, checked on reading.

These files have no checksum. Fields may be missing, since earlier versions wrote fewer: each reader names the fields it
needs. A field that is present must have its type. Neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested, read_json

from .value_checks import Check, amount, anything, by_name, count, each, flag, maybe, number, table, text, wrong

LINE: dict[str, Check] = {
    "task": text, "metric": text, "filter": text, "score": maybe(number), "low": maybe(number),
    "high": maybe(number), "n": count,
    "tokens": maybe(count), "forwards": maybe(count), "forwards_by_kind": by_name(count), "slots": maybe(count),
    "seconds": maybe(amount),
    "slots_per_token": maybe(amount), "tokens_per_forward": maybe(amount), "tokens_per_second": maybe(amount),
    "truncated_prompts": maybe(count), "length_limit_hits": maybe(count), "unended_thinking": count,
}  # fmt: skip
"""A row of the result table (`lines`, `parts`)."""
COUNTED = {name: LINE[name] for name in ("task", "n")}
"""Fields of a row that every reader needs."""
GATE: dict[str, Check] = {
    "gate": text, "task": text, "count": count, "n": lambda n: count(n) and n > 0, "threshold": number,
    "keys": each(text), "share": number, "ok": flag,
}  # fmt: skip
"""A health gate."""
PROTOCOL: dict[str, Check] = {
    "num_fewshot": maybe(count), "template": text, "prompt": text, "until": anything, "source": text,
    "max_gen_toks": maybe(count), "extractors": by_name(text), "metrics": each(anything),
    "chat": maybe(by_name(anything)),
}  # fmt: skip
"""The protocol of one task."""
CONDITIONS: dict[str, Check] = {
    "drafts_by_cost": flag, "forward": maybe(text), "batch_size": anything, "sessions": maybe(count),
    "slot_budget": maybe(each(count)), "rows": maybe(each(count)),
}  # fmt: skip
"""Conditions of the speeds, see `speed_conditions`."""
LATER_CONDITIONS: dict[str, Check] = {"drafts_by_time": flag, "plain_share": maybe(amount)}
"""Conditions that earlier versions did not write."""
RESULT_HOLDS: dict[str, Check] = {
    "spec_id": text, "model": text, "decoder": table({"name": text}), "chat": maybe(by_name(anything)),
    "protocol": maybe(table({}, {"name": text, "hash": text, "about": text, "tasks": by_name(table({}, PROTOCOL))})),
    "lines": each(table(COUNTED, LINE)), "parts": each(table(COUNTED, LINE)), "members": by_name(each(text)),
    "task_versions": by_name(anything), "data": each(text), "health": each(table(GATE)), "lost": by_name(text),
    "started": maybe(text), "wall_seconds": maybe(amount), "notices": each(text), "remote_code": each(text),
    "quantization": maybe(text), "conditions": table(CONDITIONS, LATER_CONDITIONS),
}  # fmt: skip
SPEC_HOLDS: dict[str, Check] = {
    "id": text, "tasks": each(text), "model": table({"path": text}), "decoder": table({"name": text}),
    "backend": maybe(table({"name": text})), "limit": maybe(count),
}  # fmt: skip
ENVIRONMENT_HOLDS: dict[str, Check] = {
    "same": by_name(anything), "versions": by_name(maybe(text)),
    "git": table({}, {"commit": maybe(text), "dirty": maybe(flag)}),
    "engine": by_name(anything), "started": text, "command": each(text), "cpus": maybe(count),
    "memory_bytes": amount, "data": each(by_name(anything)), "isolation": maybe(text),
    "sessions": count, "imported": table({"harness": text, "files": each(text)}),
}  # fmt: skip
_BOUNDS = maybe(table({"mean": number, "low": maybe(number), "high": maybe(number), "n": count}))
_POINT: dict[str, Check] = {
    "name": text, "settings": by_name(anything), "n": count, "score": _BOUNDS, "tokens_per_second": _BOUNDS,
    "tokens_per_forward": _BOUNDS, "forwards_per_answer": _BOUNDS, "dominated_by": maybe(text), "stopped": maybe(text),
    "folder": text,
}  # fmt: skip
"""A point of a sweep's result, as `sweeps.pareto.Placed` has it."""
SWEEP_HOLDS: dict[str, Check] = {
    "id": text, "by": text, "baseline": maybe(text), "points": each(table(_POINT, {"repeats": count, "method": text})),
    "frontier": each(text), "best": maybe(text), "within": amount, "lost": by_name(text),
}  # fmt: skip
SWEEP_MAY_HOLD: dict[str, Check] = {
    "caption": text,
    "left_out": text,
    "areas": each(table({"method": text, "mean": maybe(number), "tasks": by_name(table({"why": text}))})),
}
"""Fields of a sweep's result that earlier versions did not write."""


_DIVERGENCE: dict[str, Check] = {
    "key": text, "place": count, "context": text, "ours": text, "theirs": text, "margin": number, "verdict": text,
}  # fmt: skip
_OPTIONAL_DIVERGENCE: dict[str, Check] = {"forward": maybe(count), "margin_recheck": number, "agrees_in_recheck": flag}
AUDIT_HOLDS: dict[str, Check] = {
    "verdict": text, "n": count, "identical": count, "tokens": count, "agreeing_tokens": count,
    "dtype": text, "recheck": maybe(text), "tolerance": maybe(number),
    "divergences": each(table(_DIVERGENCE, _OPTIONAL_DIVERGENCE)),
    "distribution": maybe(table({"n": count, "p": number, "ok": flag, "enough": count})),
}  # fmt: skip
_POLICY: dict[str, Check] = {
    "name": text, "forwards_per_token": amount, "slots_per_token": amount, "cost_per_token": amount,
}  # fmt: skip
KHEAD_HOLDS: dict[str, Check] = {
    "slot_budget": count,
    "tasks": by_name(table({
        "positions": count, "predicted": amount, "possible": amount, "k_star": maybe(amount),
        "joint": each(each(count)), "calibration": each(table({"predicted": count, "n": count})),
        "by_step": each(table({"step": count, "n": count, "accepted": amount})),
        "policies": each(table(_POLICY)), "best_fixed": count, "regret": number,
    })),
}  # fmt: skip
"""Fields of audit.json and khead.json that reports need."""
OPTIONAL_BESIDE: dict[str, Check] = {"promises": flag, "tau": maybe(number), "k_max": count}
"""Their optional fields: earlier versions did not write all of them."""


def read_beside(file: Path, holds: dict[str, Check]) -> Nested | None:
    """audit.json or khead.json of a run; None where it is missing. Raises ConfigError naming file and field."""
    if not file.exists():
        return None
    values = read_json(file)
    if problem := wrong(values, holds, OPTIONAL_BESIDE):
        raise ConfigError(f"{file}: not as fluid-eval {file.stem} writes it ({problem}); remove it, or make it anew")
    return values


def read_result(file: Path, needed: Iterable[str] = (), *, shown: bool = False) -> Nested:
    """A run's result.  needed: fields that must be present.  shown: rows must be complete, for printing.

    Raises ConfigError naming file and field.
    """
    result = read_json(file)
    if missing := sorted(set(needed) - result.keys()):
        raise ConfigError(f"{file}: lacks {', '.join(missing)}; run again into another --out")
    lines = {name: each(table(LINE)) for name in ("lines", "parts")} if shown else {}
    return _checked(file, result, {**RESULT_HOLDS, **lines})


def read_sweep(file: Path) -> Nested:
    """A sweep's result. Raises ConfigError naming file and field."""
    values = read_json(file)
    if problem := wrong(values, SWEEP_HOLDS, SWEEP_MAY_HOLD):
        raise ConfigError(
            f"{file}: no finished sweep ({problem}); finish it with --resume, or run it into another --out"
        )
    return values


def read_spec(file: Path, needed: Iterable[str] = ()) -> Nested:
    """A run's spec as stored, by any version.  needed: fields that must be present.

    Raises ConfigError naming file and field.
    """
    values = read_json(file)
    if problem := wrong(values, {name: SPEC_HOLDS[name] for name in needed}, SPEC_HOLDS):
        raise ConfigError(f"{file}: no run's spec ({problem}); run again into another --out")
    return values


def read_environment(file: Path) -> Nested:
    """A run's environment; empty where the file is missing. Raises ConfigError naming file and field."""
    return _checked(file, read_json(file), ENVIRONMENT_HOLDS) if file.exists() else {}


def _checked(file: Path, values: Nested, holds: dict[str, Check]) -> Nested:
    if problem := wrong(values, {}, holds):
        raise ConfigError(f"{file}: no run wrote this ({problem}); run again into another --out")
    return values
