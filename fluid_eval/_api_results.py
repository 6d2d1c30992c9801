"""What the functions of `_api` return: results with a type for each field, that notebooks and `print` show as tables.

    Result        one run        rows, health, samples; samples_frame()
    SweepResult   a sweep        points on the frontier; frame(), figure(), run(POINT)
    Comparison    several runs   pairs; frame(), worse(POINTS)
    AuditResult   losslessness   verdict, agreeing tokens

`values` of each holds what the command prints with --json. Data frames are made on demand, by pandas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fluid_model.common.errors import ConfigError

from .analysis import compare
from .common.stats import Interval
from .output import notebook
from .output.terminal_pairs import difference_table, speed_table
from .output.terminal_results import cost_table, score_table
from .output.terminal_sweeps import point_table
from .results.finished_runs import load_results, read_finished, rows_frame
from .results.health import Gate
from .results.metrics import TableRow
from .results.run_folder import RESULT, SWEEP
from .results.sample import Sample
from .results.stored_values import read_sweep
from .sweeps import frontier_figure, frontier_files
from .sweeps.pareto import SPEEDS, Placed

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_NEEDED = ("spec_id", "model", "decoder", "health")
"""Fields that a run's result needs to be shown."""


class _Shown:
    """An object that notebooks show as small HTML tables, `print` and a prompt as the same tables in text."""

    def _parts(self) -> list[str | Table]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return notebook.text(self._parts())

    def _repr_html_(self) -> str:
        return notebook.html(self._parts())


@dataclass(frozen=True, repr=False)
class Result(_Shown):
    """A finished run.

    folder: the run folder.  model: path or hub id.  decoder: its name and settings.
    rows: the result table, one row a task, metric and filter; scores from 0 to 1, with their 95% interval and cost.
    health: gates, each a share of samples against its threshold.
    failed: reason by key, of samples whose request failed; they are in no score.
    values: result.json.
    """

    folder: Path
    spec_id: str
    model: str
    decoder: Mapping[str, Any]
    rows: tuple[TableRow, ...]
    health: tuple[Gate, ...]
    failed: Mapping[str, str]
    values: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Read a run folder. Raises ConfigError if it holds no finished run, or its files do not agree."""
        values, _ = read_finished(folder, _NEEDED, shown=True)
        return cls.of(folder, values)

    @classmethod
    def of(cls, folder: Path, values: Mapping[str, Any]) -> Result:
        """A result from the values of result.json."""
        return cls(
            folder=folder,
            spec_id=values["spec_id"],
            model=values["model"],
            decoder=values["decoder"],
            rows=tuple(map(TableRow.from_dict, values["lines"])),
            health=tuple(map(Gate.from_dict, values["health"])),
            failed=values.get("lost", {}),
            values=values,
        )

    @property
    def healthy(self) -> bool:
        """Whether no health gate is over its threshold."""
        return all(gate.ok for gate in self.health)

    def row(self, task: str, metric: str | None = None) -> TableRow:
        """The row of a task: its first metric, or the one named. Raises ConfigError naming the known ones."""
        rows = [row for row in self.rows if row.task == task and metric in (None, row.metric)]
        if not rows:
            known = ", ".join(f"{row.task} {row.metric}" for row in self.rows)
            raise ConfigError(f"{self.folder}: no row of {task} {metric or ''}; known: {known}".replace(" ;", ";"))
        return rows[0]

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """All samples, in task and document order, read when first asked for."""
        return tuple(map(Sample.from_record, read_finished(self.folder)[1]))

    def samples_frame(self) -> pandas.DataFrame:
        """One row a sample, see `load_results`."""
        return load_results(self.folder)

    def frame(self) -> pandas.DataFrame:
        """The result table as a data frame: scores from 0 to 1, seconds, tokens, forwards."""
        return rows_frame([row.to_dict() for row in self.rows])

    def _parts(self) -> list[str | Table]:
        lines = self.values["lines"]
        over = [
            f"{gate.task}: {gate.gate} {gate.share:.1%}, over {gate.threshold:.0%}"
            for gate in self.health
            if not gate.ok
        ]
        failed = [f"{len(self.failed)} samples failed, and are in no score"] if self.failed else []
        head = f"{self.model}  decoder {self.decoder['name']}  {self.folder}"
        return [head, score_table(lines), cost_table(lines), *over, *failed]


@dataclass(frozen=True, repr=False)
class SweepResult(_Shown):
    """A finished sweep.

    by: the speed of the frontier.  baseline: the first AR point, if any.  within: points of score.
    best: the fastest point that scores at most `within` less than the baseline; without one, than the best score.
    points: each with score (0 to 1) and speeds, with their 95% intervals.  frontier: names of those on it.
    failed: reason by "POINT: KEY", of samples whose request failed.
    values: the sweep's result.json.
    """

    folder: Path
    by: str
    baseline: str | None
    best: str | None
    within: float
    points: tuple[Placed, ...]
    frontier: tuple[str, ...]
    failed: Mapping[str, str]
    values: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> SweepResult:
        """Read a sweep's folder. Raises ConfigError if it holds no finished sweep."""
        if not (folder / SWEEP).is_file():
            raise ConfigError(f"{folder}: no sweep here (no {SWEEP}); name the folder of fluid-eval sweep --out")
        if not (folder / RESULT).is_file():
            raise ConfigError(f"{folder}: this sweep is not finished (no {RESULT}); run it again with --resume first")
        return cls.of(folder, read_sweep(folder / RESULT))

    @classmethod
    def of(cls, folder: Path, values: Mapping[str, Any]) -> SweepResult:
        """A result from the values of the sweep's result.json."""
        same = ("by", "baseline", "best", "within")
        return cls(
            folder=folder,
            **{name: values[name] for name in same},
            points=tuple(map(_placed, values["points"])),
            frontier=tuple(values["frontier"]),
            failed=values["lost"],
            values=values,
        )

    def run(self, point: str) -> Result:
        """The run of a point. Raises ConfigError if there is no such point, or if it was stopped early."""
        folders = {values["name"]: values["folder"] for values in self.values["points"]}
        if point not in folders:
            raise ConfigError(f"{self.folder}: no point {point!r}; known: {', '.join(folders)}")
        return Result.load(self.folder / folders[point])

    def frame(self) -> pandas.DataFrame:
        """One row a point: settings, score (%), speeds, each with its interval, as frontier.csv has them."""
        return frontier_files.table(self.points)

    def figure(self) -> Figure:
        """Score against speed, as `fluid-eval sweep` draws it; a matplotlib figure that notebooks show.

        Raises ConfigError if no point has a speed.
        """
        drawn = frontier_figure.figure(self.points, by=self.by, baseline=self.baseline)  # type: ignore[arg-type]
        if drawn is None:
            raise ConfigError(f"{self.folder}: nothing was generated, so that there is no speed to draw")
        # a notebook shows figures by itself only once pyplot has been imported
        drawn._repr_png_ = lambda: frontier_figure.png(drawn)  # type: ignore[attr-defined]
        return drawn

    def _parts(self) -> list[str | Table]:
        best = f"fastest within {self.within:g} of {self.baseline or 'the best score'}: {self.best}"
        return [str(self.folder), point_table(self.values), *([best] if self.best else [])]


def _placed(values: Mapping[str, Any]) -> Placed:
    """A point of result.json."""
    known = {f.name: values[f.name] for f in fields(Placed) if f.name in values}
    return Placed(**known | {name: _interval(values[name]) for name in ("score", *SPEEDS)})


def _interval(values: Mapping[str, Any] | None) -> Any:
    return None if values is None else Interval.from_dict(values)


@dataclass(frozen=True, repr=False)
class Comparison(_Shown):
    """Finished runs compared in pairs, by the documents that both answered.

    protocol_difference: a line each.  pairs: scores, speeds and flips of two runs, see docs/comparing.md.
    values: as `fluid-eval compare --json` prints it.
    """

    runs: tuple[Mapping[str, Any], ...]
    protocol_difference: tuple[str, ...]
    pairs: tuple[Mapping[str, Any], ...]
    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Comparison:
        """A comparison from its values."""
        runs, differences, pairs = (tuple(values[name]) for name in ("runs", "protocol_difference", "pairs"))
        return cls(runs=runs, protocol_difference=differences, pairs=pairs, values=values)

    def worse(self, points: float) -> Sequence[Mapping[str, Any]]:
        """Entries in which a run is significantly worse than its base, by more than `points` of score (%)."""
        return compare.worse(self.values, points)

    def frame(self) -> pandas.DataFrame:
        """One row a pair and task, and one over all tasks: scores from 0 to 1, their difference with its interval.

        p: of McNemar's exact test.  mde: smallest difference detected with 80% power.
        """
        rows = [
            {
                "base": pair["base"], "other": pair["other"], "task": entry["task"], "n": entry["n"],
                "score_base": entry["base"]["mean"], "score_other": entry["other"]["mean"],
                "difference": entry["difference"]["mean"], "difference_low": entry["difference"]["low"],
                "difference_high": entry["difference"]["high"], "p": entry["mcnemar_p"], "mde": entry["mde"],
                "gained": entry["c"], "lost": entry["b"],
            }
            for pair in self.pairs
            for entry in compare.entries(pair)
        ]  # fmt: skip
        return rows_frame(rows)

    def _parts(self) -> list[str | Table]:
        parts: list[str | Table] = [f"protocols differ: {line}" for line in self.protocol_difference]
        for pair in self.pairs:
            parts += [f"base: {pair['base']}", f"other: {pair['other']}", difference_table(pair)]
            if pair["speed"]["tokens_per_forward"]:
                parts.append(speed_table(pair))
        return parts


@dataclass(frozen=True, repr=False)
class AuditResult:
    """Whether a decoder wrote AR's text of the same weights, see docs/audit.md.

    verdict: identical, numerical near-tie or algorithmic; of sampled text: no difference found, undecided or different.
    lossless: the verdict is no fault of the decoder.
    n, identical: texts.  tokens, agreeing_tokens: ends included; agreeing before the first difference.
    values: as `fluid-eval audit --json` prints it.
    """

    verdict: str
    lossless: bool
    n: int
    identical: int
    tokens: int
    agreeing_tokens: int
    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> AuditResult:
        """An audit from its values."""
        from .analysis.losslessness import FAULTS

        names = ("verdict", "n", "identical", "tokens", "agreeing_tokens")
        return cls(**{name: values[name] for name in names}, lossless=values["verdict"] not in FAULTS, values=values)

    def __repr__(self) -> str:
        from .output.terminal_audits import print_audit

        return notebook.printed(lambda console: print_audit(self.values, console))

    def _repr_html_(self) -> str:
        return notebook.preformatted(str(self))
