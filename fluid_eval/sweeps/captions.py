"""The caption of the frontier's figure: what it shows, of how many documents, with which settings and hardware."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.tables import latex_text
from .frontier_figure import FEW, stem
from .frontier_files import NAMES, left_out, listed
from .pareto import Placed, Speed, frontier
from .points import is_of_backend

Values = Mapping[str, Any]
_LETTERS = {"decoder.confidence": "γ is confidence", "decoder.max_horizon": "K max_horizon", "model.tau": "τ tau"}
_LIBRARIES = ("fluid-eval", "torch", "transformers", "lm-eval")
_MOST_TASKS = 6


def caption(
    placed: Sequence[Placed], runs: Sequence[tuple[Values, Values]], *, by: Speed, baseline: str | None = None
) -> str:
    """The caption in plain text, a sentence a fact.

    placed: measured by the speed `by`.  runs: spec and environment of each point, in the same order.
    """
    shown = [p for p in placed if getattr(p, by) is not None]
    sentences = [_subject(shown, runs, by), *_reading(shown, by, baseline), _intervals(shown, by)]
    if without := left_out(placed, by):
        sentences.append(f"{without}.")
    sentences += [_labels(shown), conditions(runs)]
    return " ".join(sentence for sentence in sentences if sentence)


def conditions(runs: Sequence[tuple[Values, Values]]) -> str:
    """Settings that the runs share, and their hardware. runs: spec and environment of each."""
    return f"{_settings(runs)} {_hardware(runs)}".strip()


def write(text: str, folder: Path, by: Speed) -> None:
    """Write the caption beside the figure: frontier-SPEED.txt, and .tex, a LaTeX figure with it."""
    name = folder / stem(by)
    name.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    figure = (
        "\\begin{figure}[t]\n\\centering\n"
        f"\\includegraphics[width=\\columnwidth]{{{stem(by)}.pdf}}\n"
        f"\\caption{{{latex_text(text)}}}\n\\label{{fig:{stem(by)}}}\n\\end{{figure}}\n"
    )
    name.with_suffix(".tex").write_text(figure, encoding="utf-8")


def _subject(shown: Sequence[Placed], runs: Sequence[tuple[Values, Values]], by: Speed) -> str:
    specs = [spec for spec, _ in runs]
    tasks = [str(task) for task in specs[0].get("tasks", [])] if specs else []
    over = ", ".join(tasks) if len(tasks) <= _MOST_TASKS else f"{len(tasks)} tasks"
    models = dict.fromkeys(Path(spec["model"]["path"].rstrip("/")).name for spec in specs)
    sizes = sorted({p.n for p in shown})
    n = f"n = {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "") if sizes else "n = 0"
    mean = ", mean over tasks" if len(tasks) > 1 else ""
    limit = ", the first of each task" if any(spec.get("limit") for spec in specs) else ""
    counted = f"{len(shown)} points, {n} documents each{limit}"
    return f"Score ({over}{mean}) against {NAMES[by]} of {', '.join(models)}: {counted}."


def _reading(shown: Sequence[Placed], by: Speed, baseline: str | None) -> Iterable[str]:
    """What shapes, colours and lines say, of those that occur."""
    if len({p.method for p in shown}) > 1:
        backends = ", and backends" if any(is_of_backend(p.method) for p in shown) else ""
        yield f"Shapes are decoders, with and without verification{backends}."
    if len(frontier(shown, by)) > 1:
        yield "The step line is the frontier."
    if any(p.dominated_by for p in shown):
        yield "Grey points are dominated: another one scores no less and is faster (95%)."
    if any(p.stopped for p in shown):
        yield "Hollow points were stopped early, and answered fewer documents."
    if baseline is not None:
        yield f"The dashed line is the score of {baseline}."


def _intervals(shown: Sequence[Placed], by: Speed) -> str:
    if by != "tokens_per_second":
        return "Bars are 95% intervals over documents."
    repeats = sorted({p.repeats for p in shown if p.repeats > 1})
    once = [p.name for p in shown if p.repeats < 2]
    if not repeats:
        text = "Bars are 95% intervals of scores over documents; tokens/s are of one run, without an interval."
    else:
        times = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
        text = f"Bars are 95% intervals: of scores over documents, of tokens/s over {times} repeats taken in turns"
        text += f"; tokens/s of {listed(once)} are of one run, without an interval." if once else "."
    if backends := [p.name for p in shown if is_of_backend(p.method)]:
        text += f" Tokens/s of {listed(backends)} are by wall time of the backend's calls."
    return text


def _labels(shown: Sequence[Placed]) -> str:
    keys = dict.fromkeys(key for p in shown for key in p.settings)
    letters = [words for key, words in _LETTERS.items() if key in keys]
    named = f"In labels, {', '.join(letters)}. " if letters else ""
    return named + ("Numbers are rows of frontier.csv." if len(shown) > FEW else "")


def _settings(runs: Sequence[tuple[Values, Values]]) -> str:
    """The decoder settings that all points of a decoder share, and those of all runs."""
    by_decoder: dict[str, list[Values]] = {}
    for spec, _ in runs:
        by_decoder.setdefault(spec["decoder"]["name"], []).append(spec["decoder"])
    parts = []
    for name, decoders in by_decoder.items():
        shared = {
            key: value
            for key, value in decoders[0].items()
            if key != "name" and value is not None and all(other.get(key) == value for other in decoders)
        }
        if shared:
            parts.append(f"{name} with " + ", ".join(f"{key} {_text(value)}" for key, value in shared.items()))
    specs = [spec for spec, _ in runs]
    for key in ("profile", "num_fewshot", "max_new_tokens", "batch_size", "seed"):
        values = {_text(spec.get(key)) for spec in specs} - {"None"}
        if len(values) == 1:
            parts.append(f"{key} {values.pop()}")
    return f"Settings: {'; '.join(parts)}." if parts else ""


def _hardware(runs: Sequence[tuple[Values, Values]]) -> str:
    """Machine and libraries; what differs between points is listed as such. Of a server nothing is known."""
    rows, servers = [], dict[str, None]()
    for spec, environment in runs:
        backend = (spec.get("backend") or {}).get("name")
        if backend and not environment.get("engine", {}).get("device"):
            servers[backend] = None
        elif environment:
            rows.append(_machine(environment, has_forward=not backend))
    parts = []
    for name in dict.fromkeys(key for row in rows for key in row):
        values = list(dict.fromkeys(row[name] for row in rows if name in row))
        parts.append(" or ".join(values))
    known = f"Hardware: {', '.join(parts)}." if parts else ""
    unknown = f"The hardware behind {', '.join(servers)} is not known." if servers else ""
    return f"{known} {unknown}".strip()


def _machine(environment: Values, *, has_forward: bool) -> dict[str, str]:
    """A run's machine in words, by what they are about. has_forward: its forward is this package's."""
    engine, versions = environment.get("engine", {}), environment.get("versions", {})
    words = {
        "device": str(engine["device"]) if engine.get("device") else "",
        "processor": f"{environment['processor']} with {environment.get('cpus')} CPUs"
        if "processor" in environment
        else "",
        "dtype": str(engine.get("dtype") or ""),
        "workers": _count(engine.get("workers"), "worker"),
        "threads": _count(engine.get("threads"), "thread"),
        "forward": f"{engine['forward']} forward" if engine.get("forward") and has_forward else "",
    }
    words |= {name: f"{name} {versions[name]}" for name in _LIBRARIES if versions.get(name)}
    return {name: text for name, text in words.items() if text}


def _count(number: Any, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}" if isinstance(number, int) else ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
