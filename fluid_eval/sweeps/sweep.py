"""A sweep: many runs over the same questions, with a frontier of score against speed at the end.

Each point is an ordinary run folder below points/. The documents are cut into batches, and all points answer one batch
before the next: points compare at any time, and dominated ones can be stopped early. Workers keep the models they have
loaded and serve every point.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested, read_json
from fluid_model.engine.records import Generation

from ..benchmarks import lm_eval_tasks
from ..common.progress import Board, ProgressBar
from ..common.spec import RunSpec
from ..common.stats import Interval
from ..results import speed_repeats as repeats
from ..results.run_folder import (
    ENVIRONMENT,
    POINTS,
    RESULT,
    SPEC,
    SWEEP,
    Record,
    Run,
    lock,
    read_samples,
    write_json,
)
from ..results.stored_values import read_environment, read_spec
from ..running.backend_pool import TextAnswer
from ..running.chunks import Chunk, FailedRequest, Pool, chunks_of
from ..running.job import Job, check_backend, check_tasks, go_offline_unless_needed, prepare
from ..running.job import default_folder as run_folder
from ..running.repeat_timing import time_in_turns
from ..running.workers import open_pool
from . import aup, pareto
from .grid import PlannedPoint, SweepPlan
from .open_files import allow_open_files
from .points_in_progress import PointInProgress, unanswered_by_batch
from .writers import Writers

MOST_BATCHES, LEAST_SAMPLES = 8, 64
"""Document batches at most, and samples of a batch at least: fewer would leave the engine's rows empty."""
PILOT = 16
"""Samples of a point that the pilot of `estimate` answers."""
PILOT_POINTS = 6
"""Points that the pilot takes, spread over the sweep."""


@dataclass(frozen=True)
class _Shared:
    """Built once and shared by all points, so that many points take no more time and memory to prepare than one.

    tasks, requests: by the settings they depend on.  encoded: token ids of texts, by tokenizer.
    """

    tasks: dict[str, lm_eval_tasks.Tasks]
    requests: dict[str, tuple[lm_eval_tasks.Asked, dict[str, int]]]
    encoded: dict[str, dict[str, tuple[int, ...]]]
    writers: Writers

    def job(self, point: PlannedPoint, run: Run) -> Job:
        spec = point.spec
        key = repr((spec.tasks, spec.num_fewshot, spec.max_new_tokens, spec.data_dir))
        if key not in self.tasks:
            self.tasks[key] = lm_eval_tasks.load_tasks(spec)
        ready = prepare(spec, self.tasks[key])
        encoded = self.encoded[repr((spec.model.path, spec.chat))]
        shared = None if spec.backend is None else partial(self.writers.of, spec)
        return Job(spec, run, ready, partial(ProgressBar, shown=False), encoded, shared)

    def asked(self, point: PlannedPoint, job: Job) -> tuple[lm_eval_tasks.Asked, dict[str, int]]:
        """A point's lm-eval requests, and the number of documents of each task."""
        spec = point.spec
        template = (spec.model.path, spec.chat, spec.backend) if spec.chat else ()
        key = repr((spec.tasks, spec.num_fewshot, spec.max_new_tokens, spec.data_dir, template))
        if key not in self.requests:
            documents = {name: len(task.eval_docs) for name, task in job.ready.tasks["tasks"].items()}
            self.requests[key] = lm_eval_tasks.requests(spec, job.ready.tasks, job.lm), documents
        return self.requests[key]


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a sweep. samples: unanswered.  forwards, seconds: extrapolated from `tried` samples.

    forwards: of the decoders; a backend's are not known.
    """

    points: int
    samples: int
    forwards: float
    seconds: float
    tried: int


def default_folder(plan: SweepPlan) -> Path:
    """sweeps/TASKS-MODEL-ID."""
    return Path("sweeps") / f"{run_folder(plan.points[0].spec).name.rsplit('-', 2)[0]}-{plan.id[:8]}"


class Sweep:
    """All points of a plan, prepared to run. Nothing is written before `work`."""

    def __init__(
        self,
        plan: SweepPlan,
        folder: Path,
        *,
        resume: bool = False,
        open_pool: Callable[[RunSpec], Pool] = open_pool,
    ) -> None:
        """Raises ConfigError if a point cannot run here, or if the folder holds other files, or this sweep without
        `resume`.
        """
        self.plan = plan
        self.folder = folder
        self._writers = Writers(open_pool)
        self._check_folder(resume)
        first = plan.points[0].spec
        for point in plan.points:
            if point.spec.backend is not None:
                check_backend(point.spec)
        check_tasks(first)
        go_offline_unless_needed(first)
        self._points: list[PointInProgress] = []
        self._batches = 2
        shared = _Shared({}, {}, defaultdict(dict), self._writers)
        for point in plan.points:
            run = Run(folder / POINTS / point.spec.id, point.spec, resume=True)
            job = shared.job(point, run)
            asked, documents = shared.asked(point, job)
            documents_asked = {(instance.task_name, instance.doc_id) for instance in asked}
            self._batches = max(2, min(MOST_BATCHES, len(documents_asked) // LEAST_SAMPLES))
            work = unanswered_by_batch(point, job, asked, documents, self._batches)
            self._points.append(PointInProgress(point, job, asked, work))
        print(*dict.fromkeys(point.job.ready.decoder for point in self._points), sep="\n", file=sys.stderr)

    def _check_folder(self, resume: bool) -> None:
        file = self.folder / SWEEP
        if file.exists() and file.stat().st_size:
            stored = read_json(file)
            if stored.get("id") != self.plan.id:
                raise ConfigError(f"{self.folder} holds another sweep; choose another --out")
            if not resume:
                raise ConfigError(f"{self.folder} holds this sweep; pass --resume to go on, or another --out")
        elif self.folder.is_dir() and {entry.name for entry in self.folder.iterdir()} - {SWEEP}:
            raise ConfigError(f"{self.folder} is not empty and holds no sweep; choose another --out")

    @property
    def _baseline(self) -> str | None:
        """The first point that decodes autoregressively."""
        return next((point.name for point in self._points if point.planned.spec.writer == "ar"), None)

    @property
    def missing(self) -> int:
        """Number of unanswered samples."""
        return sum(len(work) for point in self._points for work in point.work.values())

    @contextmanager
    def _pool(self) -> Iterator[Writers]:
        """Workers for all points, closed in any case."""
        try:
            yield self._writers
        finally:
            self._writers.close()

    def estimate(self) -> Estimate:
        """The cost of the sweep, from a pilot over a few samples of a few points. Writes nothing."""
        tried, counted, forwards, seconds = 0, 0, 0.0, 0.0
        with self._pool() as pool:
            every = max(1, len(self._points) // PILOT_POINTS)
            for point in self._points[::every][:PILOT_POINTS]:
                unanswered = [item for batch in sorted(point.work) for item in point.work[batch]]
                pilot = unanswered[:: max(1, len(unanswered) // PILOT)][:PILOT]
                own = pool.of(point.planned.spec)
                for _, answer in pool.run(chunks_of(own, point.name, point.planned.spec, pilot)):
                    if not isinstance(answer, FailedRequest):
                        tried += 1
                        seconds += answer.seconds / own.size
                        if not isinstance(answer, TextAnswer):
                            counted += 1
                            forwards += sum(answer.trace.forwards.values())
        by_decoders = sum(len(work) for p in self._points if not p.is_backend for work in p.work.values())
        forwards *= by_decoders / max(1, counted)
        return Estimate(len(self._points), self.missing, forwards, seconds * self.missing / max(1, tried), tried)

    def work(
        self,
        *,
        stop_dominated: bool = False,
        by: pareto.Speed = pareto.BY,
        within: float = pareto.WITHIN,
        speed_repeats: int = 0,
    ) -> Nested:
        """Answer and score all points and place them on the frontier. Returns the sweep's result.json.

        stop_dominated: stop points early that another one beats at score and speed on the documents so far.
        by: the speed that counts.  within: points of score that the best point may lie below AR; without AR, below the
        best score.
        speed_repeats: least number of times that all answers are generated again for their time, points in turns.
        """
        # 1) nothing to do if the stored result was made with the same settings
        repeats.check_count(speed_repeats or None)
        stored = read_json(self.folder / RESULT) if (self.folder / RESULT).exists() else {}
        stopped = {point["name"] for point in stored.get("points", []) if point["stopped"]} if stop_dominated else set()
        timed = all(point.timed(speed_repeats) for point in self._points if point.name not in stopped)
        if (stored.get("by"), stored.get("within")) == (by, within) and (stop_dominated or not self.missing) and timed:
            return stored
        allow_open_files(len(self._points))
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / SWEEP).open("ab") as head:
            lock(head, self.folder)
            self._write_head(head)
            started, before = time.perf_counter(), self.missing
            try:
                # 2) answer what is missing, then time it
                if before or not timed:
                    with self._pool() as pool:
                        self._begin(pool, timed)
                        with Board([point.name for point in self._points], self._counts()) as board:
                            self._answer(pool, board, stop_dominated, by)
                        if not timed:
                            self._time(pool, speed_repeats)
                # 3) score, place, store
                return self._finish(by, within, before, time.perf_counter() - started)
            finally:
                for point in self._points:
                    point.job.close()

    def _write_head(self, head: IO[bytes]) -> None:
        """Write the list of points into the locked file, which must not be replaced."""
        points = [
            {"name": p.name, "settings": dict(p.settings), "folder": f"{POINTS}/{p.spec.id}"} for p in self.plan.points
        ]
        if head.tell() == 0:
            head.write(json.dumps({"id": self.plan.id, "points": points}, indent=2, ensure_ascii=False).encode())
            head.flush()

    def _counts(self) -> list[tuple[int, int]]:
        """(answered, all) samples of each point."""
        counts = []
        for point in self._points:
            answered = len(point.job.opened.samples)
            counts.append((answered, answered + sum(map(len, point.work.values()))))
        return counts

    def _begin(self, pool: Writers, timed: bool) -> None:
        session = secrets.token_hex(6)
        for point in self._points:
            if point.work or (not timed and not point.is_backend):
                point.job.begin(pool.of(point.planned.spec), session)

    def _time(self, pool: Writers, count: int) -> None:
        """Speed repeats of all decoders' points that have answered everything, in turns."""
        finished = [point for point in self._points if point.stopped is None and not point.is_backend]
        jobs = {point.name: point.job for point in finished}
        asked = {point.name: point.asked for point in finished}
        time_in_turns(pool.of(finished[0].planned.spec), jobs, asked, count)

    def _answer(self, pool: Writers, board: Board, stop_dominated: bool, by: pareto.Speed) -> None:
        """Answer everything missing, one document batch after the other; stop dominated points between batches."""
        points = {point.name: point for point in self._points}
        batches: list[list[Chunk]] = [self._chunks(pool, batch) for batch in range(self._batches)]
        if not stop_dominated:  # nothing happens between batches, so all go at once
            batches = [[chunk for chunks in batches for chunk in chunks]]
        for batch, chunks in enumerate(batches):
            # 1) answer and store the batch
            running = [chunk for chunk in chunks if points[chunk.point].stopped is None]
            spent: dict[str, list[tuple[int | None, float]]] = defaultdict(list)  # tokens, seconds of each answer
            for name, answer in pool.run(running):
                points[name].job.lm.store(answer)
                board.advance(name, failed=isinstance(answer, FailedRequest))
                if isinstance(answer, Generation):
                    spent[name].append((len(answer.ids), answer.seconds))
                elif isinstance(answer, TextAnswer) and answer.finish:  # a text, no choice
                    spent[name].append((answer.tokens, answer.seconds))
            # 2) its speed, then dominated points
            for name, answers in spent.items():
                points[name].note_pace(batch, answers)
            if stop_dominated and batch + 1 < self._batches:
                self._stop_dominated((batch + 1) / self._batches, by, board)

    def _chunks(self, pool: Writers, batch: int) -> list[Chunk]:
        """A batch's work, ordered by model, since loading a model costs more than a chunk."""
        models = list(dict.fromkeys(point.planned.spec.model.path for point in self._points))
        order = sorted(self._points, key=lambda point: models.index(point.planned.spec.model.path))
        return [
            chunk
            for point in order
            if point.work.get(batch)
            for chunk in chunks_of(pool.of(point.planned.spec), point.name, point.planned.spec, point.work[batch])
        ]

    def _stop_dominated(self, share: float, by: pareto.Speed, board: Board) -> None:
        """Stop points that another one beats at score and speed on the documents so far."""
        running = [point for point in self._points if point.stopped is None]
        measured = {point.name: replace(point.to_point(point.job.score(share)), paces=point.paces) for point in running}
        for point in running:
            if point.name == self._baseline:
                continue  # the others are compared with it
            others = (other.name for other in running if other is not point and other.stopped is None)
            better = next((name for name in others if pareto.below(measured[point.name], measured[name], by=by)), None)
            if better is not None:
                point.stopped = f"below {better} after {share:.0%} of the documents"
                board.stop(point.name)

    def so_far(self, *, by: pareto.Speed = pareto.BY, within: float = pareto.WITHIN) -> Nested:
        """Place the points by the document batches that all of them have answered. Writes only tables and figure.

        Raises ConfigError if there is no such batch yet.
        """
        batches = next(
            (batch for batch in range(self._batches) if any(point.work.get(batch) for point in self._points)),
            self._batches,
        )
        if not batches:
            raise ConfigError(f"{self.folder}: not all points have answered their first {1 / self._batches:.0%} yet")
        scored = [(point, point.job.score(batches / self._batches)) for point in self._points]
        return {**self._place(scored, by, within), "so_far": batches / self._batches}

    def _finish(self, by: pareto.Speed, within: float, answered: int, seconds: float) -> Nested:
        """Score every point, place them all, write tables, figure and result."""
        scored = []
        for point in self._points:
            folder = point.job.opened.folder
            if point.stopped is not None:
                records = point.job.score(point.answered_share(self._batches))
            else:
                if not (folder / RESULT).exists():
                    point.job.work()
                records = list(read_samples(folder))
            scored.append((point, records))
        result = self._place(scored, by, within)
        result |= {"answered_now": answered, "wall_seconds": round(seconds, 3)}
        write_json(self.folder / RESULT, result)
        return result

    def _place(self, scored: list[tuple[PointInProgress, list[Record]]], by: pareto.Speed, within: float) -> Nested:
        """The points by score and speed, as result.json holds them. Writes tables and figure."""
        from . import captions, frontier_figure, frontier_files

        # 1) samples that failed; a point without any other sample has no score
        failed = {f"{point.name}: {r['key']}": r["lost"] for point, records in scored for r in records if "lost" in r}
        points = [point.to_point(records) for point, records in scored]
        for point in points:
            if not point.samples:
                raise RunError(f"{point.name}: every sample failed ({next(iter(failed.values()), '')})")
        # 2) intervals, frontier, best point
        placed, baseline = pareto.measure(points, by=by), self._baseline
        frontier_files.write_tables(placed, self.folder)
        has_figure = frontier_figure.draw(placed, self.folder, by=by, baseline=baseline)
        caption = captions.caption(placed, [_conditions(point) for point in self._points], by=by, baseline=baseline)
        if has_figure:
            captions.write(caption, self.folder, by)
        best = pareto.best(placed, baseline=baseline, within=within, by=by)
        return {
            "id": self.plan.id,
            "by": by,
            "baseline": baseline,
            "points": [_result_of(place, point) for place, point in zip(placed, self._points, strict=True)],
            "frontier": pareto.frontier(placed, by),
            "left_out": frontier_files.left_out(placed, by),
            "within": within,
            "best": best.name if best else None,
            "areas": aup.as_rows(
                aup.areas([(each.model_and_method, point) for each, point in zip(self._points, points, strict=True)])
            ),
            "lost": failed,
            "health": [{"point": p.name, **gate} for p, records in scored for gate in p.job.health(records)],
            "figure": has_figure,
            "caption": caption if has_figure else "",
        }


def _conditions(point: PointInProgress) -> tuple[Nested, Nested]:
    """A point's spec and environment, as stored."""
    folder = point.job.opened.folder
    return read_spec(folder / SPEC), read_environment(folder / ENVIRONMENT)


def _result_of(place: pareto.Placed, point: PointInProgress) -> Mapping[str, Any]:
    """A point's entry in result.json: the fields of `Placed`, intervals as tables."""
    values = {name: value.to_dict() if isinstance(value, Interval) else value for name, value in vars(place).items()}
    return {**values, "settings": dict(place.settings), "folder": f"{POINTS}/{point.planned.spec.id}"}
