"""Which runs a sweep is made of: a grid over settings, a random sample of it, points named one by one.

In a spec file a sweep is a run's settings and a table beside them:

    [sweep.grid]
    "decoder.confidence" = [0.5, 0.7, 0.9]
    "decoder.verify" = [true, false]

    [[sweep.point]]
    "decoder.name" = "ar"

`sweep.sample = 20` takes that many points of the grid at random (`sweep.seed`, default 0). No torch here.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least, put, read_value
from fluid_model.common.files import Nested
from fluid_model.settings import DECODERS

from ..common.spec import RunSpec, build_spec, tables
from ..running.decoder_choice import with_decoder

KNOWN = {"grid", "point", "sample", "seed"}
MOST_POINTS = 100_000
SHORT = {
    "decoder.confidence": "γ", "decoder.max_horizon": "K", "model.tau": "τ", "decoder.block_length": "block",
    "decoder.name": "", "model.path": "",
}  # fmt: skip
"""Names of settings in a point's name; of those that are empty the value says enough."""


@dataclass(frozen=True)
class PlannedPoint:
    """One run of a sweep. settings: what tells it from the others."""

    name: str
    settings: Mapping[str, Any]
    spec: RunSpec


@dataclass(frozen=True)
class Plan:
    """All points of a sweep, each spec once. merged: points of the grid that are the same run as another."""

    points: tuple[PlannedPoint, ...]
    merged: int

    @property
    def id(self) -> str:
        """12 hex digits of the points' ids."""
        return hashlib.sha256("".join(sorted(point.spec.id for point in self.points)).encode()).hexdigest()[:12]


def read_axis(text: str) -> tuple[str, list[Any]]:
    """`name=a,b,c` as --sweep takes it: values are TOML where they are, plain text otherwise."""
    name, sign, values = text.partition("=")
    if not sign or not name.strip() or not values:
        raise ConfigError(f"--sweep {text}: must read name=value,value")
    return name.strip(), [read_value(value.strip()) for value in values.split(",")]


def plan(values: Mapping[str, Any]) -> Plan:
    """The points of a sweep's values. Raises ConfigError naming the point that is no run, and what is wrong with it."""
    values = dict(values)
    sweep = values.pop("sweep", {})
    if not isinstance(sweep, Mapping) or (unknown := set(sweep) - KNOWN):
        what = f"sweep.{sorted(unknown)[0]} is no setting" if isinstance(sweep, Mapping) else "sweep must be a table"
        raise ConfigError(f"{what}; known: {', '.join(f'sweep.{name}' for name in sorted(KNOWN))}")
    points = sweep.get("point", [])
    if not isinstance(points, Sequence) or not all(isinstance(point, Mapping) for point in points):
        raise ConfigError(f"sweep.point={points!r} must be tables: [[sweep.point]]")
    settings = [*_grid(sweep), *(dict(_flat(point)) for point in points)]
    if not any(settings):
        raise ConfigError(
            "a sweep needs settings to vary: --sweep decoder.confidence=0.5,0.9, or a file's [sweep.grid]"
        )
    found: dict[str, PlannedPoint] = {}
    for point in settings:
        kept, spec = _spec(values, point)
        if spec.id not in found:
            found[spec.id] = PlannedPoint(_name(kept), kept, spec)
    _check_same_questions(found.values())
    names = Counter(point.name for point in found.values())
    if max(names.values()) > 1:  # they differ in what a short name does not tell
        found = {key: replace(point, name=f"{point.name} {key[:4]}") for key, point in found.items()}
    return Plan(tuple(found.values()), len(settings) - len(found))


def _grid(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points of the grid, or as many of them as asked."""
    axes = dict(_flat(sweep.get("grid", {})))
    for name, axis in axes.items():
        if not isinstance(axis, list) or not axis:
            raise ConfigError(f"sweep.grid.{name}={axis!r} must be a list of values")
    if not axes:
        return []
    count = 1
    for axis in axes.values():
        count *= len(axis)
    sample, seed = sweep.get("sample"), sweep.get("seed", 0)
    at_least("sweep.sample", sample, 1)
    if count > MOST_POINTS and sample is None:
        raise ConfigError(f"sweep.grid has {count:,} points; take some of them: sweep.sample=100")
    places: Sequence[int] = range(count)
    if sample is not None and sample < count:
        places = sorted(random.Random(seed).sample(places, sample))
    if sample is None or sample >= count:
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [_at(axes, place) for place in places]


def _at(axes: Mapping[str, list[Any]], place: int) -> dict[str, Any]:
    """The point at a place of the grid, the first axis running fastest."""
    point = {}
    for name, axis in axes.items():
        place, index = divmod(place, len(axis))
        point[name] = axis[index]
    return point


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"sweep: {values!r} must be a table of settings")
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def _spec(values: Mapping[str, Any], point: Mapping[str, Any]) -> tuple[dict[str, Any], RunSpec]:
    """A point's run, and what of its settings means something to its decoder."""
    kept = dict(point)
    try:
        merged = copy.deepcopy(tables(values))
        if "decoder.name" not in point:
            merged["decoder"] = _own_decoder(merged, point)
        else:  # what means nothing to it is left out
            kept = _known_to(point["decoder.name"], point)
            if point["decoder.name"] != _own_decoder(merged, point).get("name"):
                merged["decoder"] = {}
        for name, value in kept.items():
            put(merged, name, value)
        return kept, build_spec(merged)
    except ConfigError as error:
        raise ConfigError(f"sweep point {_name(point)}: {error}") from error


def _own_decoder(values: Nested, point: Mapping[str, Any]) -> Nested:
    """The base's decoder, named as the model of a point would have it where the base names none."""
    values = copy.deepcopy(values)
    for name, value in point.items():
        if name.partition(".")[0] == "model":
            put(values, name, value)
    decoder: Nested = with_decoder(values).get("decoder", {})
    return decoder if isinstance(decoder, dict) else {"name": decoder}


def _known_to(decoder: Any, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point's settings without those of other decoders."""
    if not isinstance(decoder, str) or decoder not in DECODERS:
        return dict(point)
    known = {f"decoder.{f.name}" for f in fields(DECODERS[decoder])} | {"decoder.name"}
    kept = {name: value for name, value in point.items() if not name.startswith("decoder.") or name in known}
    if decoder != "fluid":
        kept.pop("model.tau", None)  # no K-head to choose
    return kept


def _check_same_questions(points: Sequence[PlannedPoint] | Any) -> None:
    """All points of a sweep answer the same questions; else nothing can be compared."""
    seen: dict[str, Any] = {}
    for point in points:
        identity = point.spec.identity()
        asked = {name: identity.get(name) for name in ("tasks", "limit", "num_fewshot", "profile", "extractor", "seed")}
        for name, value in asked.items():
            if seen.setdefault(name, value) != value:
                raise ConfigError(
                    f"sweep point {point.name}: {name} differs between points, whose answers could not be compared"
                )


def _name(settings: Mapping[str, Any]) -> str:
    """What tells a point from others, in short: `γ=0.9 K=16 no verify`."""
    words = []
    for name, value in settings.items():
        last = SHORT.get(name, name.rpartition(".")[2])
        text = json.dumps(value, ensure_ascii=False).strip('"') if not isinstance(value, str) else value
        if isinstance(value, bool):
            words.append(last if value else f"no {last}")
        else:
            words.append(f"{last}={text}" if last else text.rstrip("/").rpartition("/")[2])
    return " ".join(words) or "as given"
