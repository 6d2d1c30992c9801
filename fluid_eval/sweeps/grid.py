"""The runs of a sweep: a grid over settings, a random sample of it, and single points.

In a spec file, a sweep is a run's settings and a `[sweep]` table. These five points are four of FLUID and one of AR:

    [sweep.grid]
    "decoder.confidence" = [0.5, 0.9]
    "decoder.verify" = [true, false]

    [[sweep.point]]
    "decoder.name" = "ar"

A point may name a backend in place of a decoder, and its arguments: `"backend.name" = "hf"`, `"backend.args.dtype"`.

`sweep.sample = 20` takes that many points of the grid at random (`sweep.seed`, default 0). No torch here.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least, put, read_value
from fluid_model.common.files import Nested
from fluid_model.registry import decoder_named, setting_names
from fluid_model.settings import DecoderSettings, FluidSettings

from ..common.spec import RunSpec, build_spec, tables
from ..running.decoder_choice import with_decoder

KNOWN = {"grid", "point", "sample", "seed"}
MOST_POINTS = 100_000
"""Largest grid that is run in full."""
SAME_FOR_ALL = ("tasks", "limit", "num_fewshot", "profile", "extractor", "seed")
"""Settings that all points share, so that they answer the same questions."""
SHORT = {
    "decoder.confidence": "γ", "decoder.max_horizon": "K", "model.tau": "τ", "decoder.block_length": "block",
    "decoder.name": "", "model.path": "", "backend.name": "",
}  # fmt: skip
"""Names of settings in a point's name; empty where the value alone is clear."""
UNNAMED = ("backend.args.base_url", "backend.args.tokenizer", "backend.args.tokenizer_backend")
"""Settings that a point's name leaves out: where a server listens, and who reads for it."""


@dataclass(frozen=True)
class PlannedPoint:
    """One run of a sweep. settings: those that distinguish it from the other points, by dotted name."""

    name: str
    settings: Mapping[str, Any]
    spec: RunSpec


@dataclass(frozen=True)
class SweepPlan:
    """All points of a sweep, each spec once. merged: number of grid points that equal another point's run.
    idle: settings of the grid without effect on points that were merged.
    """

    points: tuple[PlannedPoint, ...]
    merged: int
    idle: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What was merged and why, in a line; empty if nothing was."""
        if not self.merged:
            return ""
        why = f": {', '.join(self.idle)} changes nothing under verification" if self.idle else ""
        count = "1 point of the grid is" if self.merged == 1 else f"{self.merged} points of the grid are"
        return f"{count} the same run as another and run once{why}"

    @property
    def id(self) -> str:
        """The sweep's id: 12 hex digits over the points' ids."""
        return hashlib.sha256("".join(sorted(point.spec.id for point in self.points)).encode()).hexdigest()[:12]


def read_axis(text: str) -> tuple[str, list[Any]]:
    """An axis as --sweep takes it: `name=a,b,c`. Values are read as TOML, or as plain text where they are none.

    Raises ConfigError if the name or the values are missing.
    """
    name, sign, values = text.partition("=")
    if not sign or not name.strip() or not values:
        raise ConfigError(f"--sweep {text}: must read name=value,value")
    return name.strip(), [read_value(value.strip()) for value in values.split(",")]


def plan(values: Mapping[str, Any]) -> SweepPlan:
    """The points of a sweep.

    values: a run's settings with the table `sweep`.  Raises ConfigError naming the first invalid point and its fault.
    """
    # 1) check the sweep table
    values = dict(values)
    sweep = values.pop("sweep", {})
    if not isinstance(sweep, Mapping) or (unknown := set(sweep) - KNOWN):
        fault = f"sweep.{sorted(unknown)[0]} is no setting" if isinstance(sweep, Mapping) else "sweep must be a table"
        raise ConfigError(f"{fault}; known: {', '.join(f'sweep.{name}' for name in sorted(KNOWN))}")
    single = sweep.get("point", [])
    if not isinstance(single, Sequence) or not all(isinstance(point, Mapping) for point in single):
        raise ConfigError(f"sweep.point={single!r} must be tables: [[sweep.point]]")
    # 2) settings of each point: the grid's, then the single ones
    settings = [*_grid(sweep), *(dict(_flat(point)) for point in single)]
    if not any(settings):
        raise ConfigError(
            "a sweep needs settings to vary: --sweep decoder.confidence=0.5,0.9, or a file's [sweep.grid]"
        )
    # 3) a run for each, equal runs once
    points: dict[str, PlannedPoint] = {}
    ignored: set[str] = set()
    for point in settings:
        relevant, spec = _spec(values, point)
        idle = without_effect(spec.decoder)
        ignored |= {name for name in relevant if name in idle}
        effective = {name: value for name, value in relevant.items() if name not in idle}
        key = replace(spec, decoder=replace(spec.decoder, **_defaults(spec.decoder, idle))).id
        if key not in points:
            points[key] = PlannedPoint(_name(effective), effective, spec)
    _check_same_questions(points.values())
    # 4) unique names: where short names coincide, the spec's id distinguishes them
    names = Counter(point.name for point in points.values())
    if max(names.values()) > 1:
        points = {key: replace(point, name=f"{point.name} {key[:4]}") for key, point in points.items()}
    merged = len(settings) - len(points)
    return SweepPlan(tuple(points.values()), merged, tuple(sorted(ignored)) if merged else ())


def without_effect(decoder: DecoderSettings) -> tuple[str, ...]:
    """Dotted names of settings that change neither text nor speed beside the others.

    FLUID's γ decides what is committed without verification; with it, in one forward a step, drafts are sized by cost.
    """
    if isinstance(decoder, FluidSettings) and decoder.rounds == "one" and decoder.verify:
        return ("decoder.confidence",)
    return ()


def _defaults(decoder: DecoderSettings, names: Iterable[str]) -> dict[str, Any]:
    """Default values of these settings of a decoder, by field."""
    bare = {name.rpartition(".")[2] for name in names}
    return {f.name: f.default for f in fields(decoder) if f.name in bare}


def _grid(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of the grid's points, or of a random sample of them."""
    # 1) the axes
    axes = dict(_flat(sweep.get("grid", {})))
    for name, axis in axes.items():
        if not isinstance(axis, list) or not axis:
            raise ConfigError(f"sweep.grid.{name}={axis!r} must be a list of values")
    if not axes:
        return []
    # 2) all points, unless fewer are asked for
    count = math.prod(len(axis) for axis in axes.values())
    sample, seed = sweep.get("sample"), sweep.get("seed", 0)
    at_least("sweep.sample", sample, 1)
    if count > MOST_POINTS and sample is None:
        raise ConfigError(f"sweep.grid has {count:,} points; take some of them: sweep.sample=100")
    if sample is None or sample >= count:
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    # 3) a sample of point numbers, so that a huge grid is never built
    return [_point(axes, number) for number in sorted(random.Random(seed).sample(range(count), sample))]


def _point(axes: Mapping[str, list[Any]], number: int) -> dict[str, Any]:
    """The point of the grid with this number; the first axis runs fastest."""
    point = {}
    for name, axis in axes.items():
        number, index = divmod(number, len(axis))
        point[name] = axis[index]
    return point


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"sweep: {values!r} must be a table of settings")
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _spec(values: Mapping[str, Any], point: Mapping[str, Any]) -> tuple[dict[str, Any], RunSpec]:
    """A point's settings without those of other writers, and its run. Raises ConfigError naming the point."""
    relevant = dict(point)
    try:
        merged = copy.deepcopy(tables(values))
        if "backend.name" in point:
            relevant = _known_to_backends(point)
            merged = _without_decoder(merged, point["backend.name"])
        elif "decoder.name" in point:
            relevant = _known_to(point["decoder.name"], point)
            merged.pop("backend", None)
            if point["decoder.name"] != _own_decoder(merged, point).get("name"):
                merged["decoder"] = {}  # the base's settings belong to another decoder
        elif "backend" not in merged:
            merged["decoder"] = _own_decoder(merged, point)
        for name, value in relevant.items():
            put(merged, name, value)
        return relevant, build_spec(merged)
    except ConfigError as error:
        raise ConfigError(f"sweep point {_name(point)}: {error}") from error


def _without_decoder(values: Nested, backend: Any) -> Nested:
    """The base's settings that a backend takes too: it loads the model itself, as its own arguments say."""
    kept = {name: value for name, value in values.items() if name not in ("decoder", "engine")}
    if isinstance(model := kept.get("model"), Mapping):
        kept["model"] = {name: value for name, value in model.items() if name == "path"}
    if isinstance(own := kept.get("backend"), Mapping) and own.get("name") != backend:
        del kept["backend"]  # whose arguments belong to another backend
    return kept


def _known_to_backends(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point's settings without those of decoders; a decoder's name stays, and is refused beside a backend's."""
    others = ("decoder.", "engine.")
    kept = {name: v for name, v in point.items() if name == "decoder.name" or not name.startswith(others)}
    kept.pop("model.tau", None)
    return kept


def _own_decoder(values: Nested, point: Mapping[str, Any]) -> Nested:
    """The base's decoder settings; its name, if not given, is chosen by the point's model."""
    values = copy.deepcopy(values)
    for name, value in point.items():
        if name.partition(".")[0] == "model":
            put(values, name, value)
    decoder: Nested = with_decoder(values).get("decoder", {})
    return decoder if isinstance(decoder, dict) else {"name": decoder}


def _known_to(decoder: Any, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point's settings without those of other decoders."""
    try:
        kind = decoder_named(decoder)
    except ConfigError:  # `build_spec` reports it
        return dict(point)
    known = {f"decoder.{setting}" for setting in (*setting_names(kind), "name")}
    relevant = {name: value for name, value in point.items() if not name.startswith("decoder.") or name in known}
    if "K-head" not in kind.needs:
        relevant.pop("model.tau", None)  # which chooses among K-heads
    return relevant


def _check_same_questions(points: Iterable[PlannedPoint]) -> None:
    """Raises ConfigError unless all points answer the same questions; other scores cannot be compared."""
    first: dict[str, Any] = {}
    for point in points:
        identity = point.spec.identity()
        for name in SAME_FOR_ALL:
            if first.setdefault(name, identity.get(name)) != identity.get(name):
                raise ConfigError(
                    f"sweep point {point.name}: {name} differs between points, whose answers could not be compared"
                )


def _name(settings: Mapping[str, Any]) -> str:
    """A point's settings in short: `γ=0.9 K=16 no verify`."""
    words = []
    for name, value in settings.items():
        if name in UNNAMED:
            continue
        last = SHORT.get(name, name.rpartition(".")[2])
        text = json.dumps(value, ensure_ascii=False).strip('"') if not isinstance(value, str) else value
        if isinstance(value, bool):
            words.append(last if value else f"no {last}")
        else:
            words.append(f"{last}={text}" if last else text.rstrip("/").rpartition("/")[2])
    return " ".join(words) or "as given"
