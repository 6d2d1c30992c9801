"""A sweep: many runs of the same questions, answered in turns, ending in a frontier.

Each point is a run folder of its own below points/, and whatever reads a run reads it. Points take turns, a share of
the documents each, so that an early stop still compares; workers hold what they load and serve every point.
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
from ..common.progress import Bar, Board
from ..common.spec import RunSpec
from ..common.stats import Interval
from ..results import speed_repeats as repeats
from ..results.run_folder import POINTS, RESULT, SWEEP, Record, Run, lock, read_samples, write_json
from ..running.chunks import Chunk, FailedRequest, Pool, chunks_of
from ..running.job import Job, check_tasks, go_offline_unless_needed, prepare
from ..running.repeat_timing import time_in_turns
from ..running.workers import open_pool
from . import pareto
from .grid import Plan, PlannedPoint
from .points_in_progress import Under, by_turn, held_share, point_of

TURNS, TURN = 8, 64
"""Shares of the documents that points take in turns, at most, and samples of a turn at least: few fill no batch."""
PILOT = 16
"""Samples of a point that a pilot takes to reckon what a sweep costs."""
PILOT_POINTS = 6
"""Points that a pilot tries, spread over the sweep."""
OTHER_FILES = 500
"""Files that a process has open beside the points' own: libraries, Ray."""


@dataclass(frozen=True)
class _Shared:
    """What points have in common, so that many of them take no more time and memory to prepare than one: tasks and what
    they ask, by the settings that decide it; ids of texts, by tokenizer.
    """

    tasks: dict[str, lm_eval_tasks.Tasks]
    requests: dict[str, tuple[lm_eval_tasks.Asked, dict[str, int]]]
    encoded: dict[str, dict[str, tuple[int, ...]]]

    def job(self, point: PlannedPoint, run: Run) -> Job:
        spec = point.spec
        key = repr((spec.tasks, spec.num_fewshot, spec.max_new_tokens, spec.data_dir))
        if key not in self.tasks:
            self.tasks[key] = lm_eval_tasks.load_tasks(spec)
        ready = prepare(spec, self.tasks[key])
        return Job(spec, run, ready, partial(Bar, shown=False), self.encoded[repr((spec.model.path, spec.chat))])

    def asked(self, point: PlannedPoint, job: Job) -> tuple[lm_eval_tasks.Asked, dict[str, int]]:
        """What a point is asked, and how many documents each task has."""
        spec = point.spec
        words = (spec.model.path, spec.chat) if spec.chat else ()
        key = repr((spec.tasks, spec.num_fewshot, spec.max_new_tokens, spec.data_dir, words))
        if key not in self.requests:
            documents = {name: len(task.eval_docs) for name, task in job.ready.tasks["tasks"].items()}
            self.requests[key] = lm_eval_tasks.requests(spec, job.ready.tasks, job.lm), documents
        return self.requests[key]


@dataclass(frozen=True)
class Estimate:
    """What a sweep will take. samples: still missing.  forwards, seconds: reckoned from `tried` samples."""

    points: int
    samples: int
    forwards: float
    seconds: float
    tried: int


class Sweep:
    """All points of a plan, prepared; nothing is written before `work`."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        resume: bool = False,
        open_pool: Callable[[RunSpec], Pool] = open_pool,
    ) -> None:
        """Raises ConfigError if a point cannot be run here, or the folder holds something else, or holds this sweep and
        `resume` is false.
        """
        self.plan = plan
        self.folder = folder
        self._open_pool = open_pool
        self._check_folder(resume)
        first = plan.points[0].spec
        check_tasks(first)
        go_offline_unless_needed(first)
        self._under: list[Under] = []
        self._turns = 2
        shared = _Shared({}, {}, defaultdict(dict))
        for point in plan.points:
            run = Run(folder / POINTS / point.spec.id, point.spec, resume=True)
            job = shared.job(point, run)
            asked, documents = shared.asked(point, job)
            self._turns = max(2, min(TURNS, len({(i.task_name, i.doc_id) for i in asked}) // TURN))
            self._under.append(Under(point, job, asked, by_turn(point, job, asked, documents, self._turns)))
        print(*dict.fromkeys(under.job.ready.decoder for under in self._under), sep="\n", file=sys.stderr)

    def _check_folder(self, resume: bool) -> None:
        file = self.folder / SWEEP
        if file.exists() and file.stat().st_size:
            held = read_json(file)
            if held.get("id") != self.plan.id:
                raise ConfigError(f"{self.folder} holds another sweep; choose another --out")
            if not resume:
                raise ConfigError(f"{self.folder} holds this sweep; pass --resume to go on, or another --out")
        elif self.folder.is_dir() and {entry.name for entry in self.folder.iterdir()} - {SWEEP}:
            raise ConfigError(f"{self.folder} is not empty and holds no sweep; choose another --out")

    @property
    def _baseline(self) -> str | None:
        """The first point that writes token by token."""
        return next((each.name for each in self._under if each.planned.spec.decoder.name == "ar"), None)

    @property
    def missing(self) -> int:
        """Samples that are not answered yet."""
        return sum(len(work) for under in self._under for work in under.work.values())

    @contextmanager
    def _pool(self) -> Iterator[Pool]:
        """Workers for all points, let go whatever happens."""
        pool = self._open_pool(self.plan.points[0].spec)
        try:
            yield pool
        finally:
            pool.close()

    def estimate(self) -> Estimate:
        """What the sweep will take, from a few samples of a few points. Writes nothing."""
        tried, forwards, seconds = 0, 0.0, 0.0
        with self._pool() as pool:
            every = max(1, len(self._under) // PILOT_POINTS)
            for under in self._under[::every][:PILOT_POINTS]:
                some = [item for turn in sorted(under.work) for item in under.work[turn]]
                some = some[:: max(1, len(some) // PILOT)][:PILOT]
                for _, answer in pool.run(chunks_of(pool, under.name, under.planned.spec, some)):
                    if not isinstance(answer, FailedRequest):
                        tried += 1
                        forwards += sum(answer.trace.forwards.values())
                        seconds += answer.seconds
            size = pool.size
        share = self.missing / max(1, tried)
        return Estimate(len(self._under), self.missing, forwards * share, seconds * share / size, tried)

    def work(
        self,
        *,
        stop_dominated: bool = False,
        by: pareto.Speed = "tokens_per_second",
        within: float = 1.0,
        speed_repeats: int = 0,
    ) -> Nested:
        """Answer, score, place; returns the sweep's result, as stored in result.json.

        speed_repeats: how often all points' answers are written again for their time, in turns, at least.

        stop_dominated: end points that another one beats at score and speed, as far as both have come.  within: points
        of score that the best point may lie below AR, or where there is no AR below the best score.
        """
        repeats.check_count(speed_repeats or None)
        held = read_json(self.folder / RESULT) if (self.folder / RESULT).exists() else {}
        ended = {point["name"] for point in held.get("points", []) if point["stopped"]} if stop_dominated else set()
        timed = all(u.timed(speed_repeats) for u in self._under if u.name not in ended)
        if (held.get("by"), held.get("within")) == (by, within) and (stop_dominated or not self.missing) and timed:
            return held
        _open_enough(len(self._under))
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / SWEEP).open("ab") as head:
            lock(head, self.folder)
            self._write_head(head)
            started, before = time.perf_counter(), self.missing
            try:
                if before or not timed:
                    with self._pool() as pool:
                        self._begin(pool, timed)
                        with Board([u.name for u in self._under], self._counts()) as board:
                            self._answer(pool, board, stop_dominated, by)
                        if not timed:
                            self._time(pool, speed_repeats)
                return self._finish(by, within, before, time.perf_counter() - started)
            finally:
                for under in self._under:
                    under.job.close()

    def _write_head(self, head: IO[bytes]) -> None:
        """Into the file that is held, which must stay the same one."""
        points = [
            {"name": p.name, "settings": dict(p.settings), "folder": f"{POINTS}/{p.spec.id}"} for p in self.plan.points
        ]
        if head.tell() == 0:
            head.write(json.dumps({"id": self.plan.id, "points": points}, indent=2, ensure_ascii=False).encode())
            head.flush()

    def _counts(self) -> list[tuple[int, int]]:
        """Samples held and samples in all, of each point."""
        found = []
        for under in self._under:
            held = len(under.job.opened.samples)
            found.append((held, held + sum(map(len, under.work.values()))))
        return found

    def _begin(self, pool: Pool, timed: bool) -> None:
        session = secrets.token_hex(6)
        for under in self._under:
            if under.work or not timed:
                under.job.begin(pool, session)

    def _time(self, pool: Pool, count: int) -> None:
        """Time all points that have answered everything, in turns."""
        going = {under.name: under for under in self._under if under.stopped is None}
        jobs, asked = ({name: getattr(u, of) for name, u in going.items()} for of in ("job", "asked"))
        time_in_turns(pool, jobs, asked, count)

    def _answer(self, pool: Pool, board: Board, stop_dominated: bool, by: pareto.Speed) -> None:
        under = {each.name: each for each in self._under}
        turns: list[list[Chunk]] = [self._chunks(pool, turn) for turn in range(self._turns)]
        if not stop_dominated:
            turns = [[chunk for turn in turns for chunk in turn]]
        for turn, chunks in enumerate(turns):
            left = [chunk for chunk in chunks if under[chunk.point].stopped is None]
            spent: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for name, answer in pool.run(left):
                under[name].job.lm.store(answer)
                board.advance(name, failed=isinstance(answer, FailedRequest))
                if isinstance(answer, Generation):
                    spent[name].append((len(answer.ids), answer.seconds))
            for name, each in spent.items():
                under[name].note_pace(turn, each)
            if stop_dominated and turn + 1 < self._turns:
                self._stop_dominated((turn + 1) / self._turns, by, board)

    def _chunks(self, pool: Pool, turn: int) -> list[Chunk]:
        """A turn's work, models one after the other, since loading one costs more than a chunk."""
        models = {each.planned.spec.model.path: None for each in self._under}
        order = sorted(self._under, key=lambda each: list(models).index(each.planned.spec.model.path))
        return [
            chunk for each in order for chunk in chunks_of(pool, each.name, each.planned.spec, each.work.get(turn, []))
        ]

    def _stop_dominated(self, share: float, by: pareto.Speed, board: Board) -> None:
        """End points that another one surely beats at both so far."""
        going = [each for each in self._under if each.stopped is None]
        points = {each.name: replace(point_of(each, each.job.score(share)), paces=each.paces) for each in going}
        for each in going:
            if each.name == self._baseline:
                continue  # all others are held against it
            others = (other.name for other in going if other is not each and other.stopped is None)
            better = next((name for name in others if pareto.below(points[each.name], points[name], by=by)), None)
            if better is not None:
                each.stopped = f"below {better} after {share:.0%} of the documents"
                board.stop(each.name)

    def so_far(self, *, by: pareto.Speed = "tokens_per_second", within: float = 1.0) -> Nested:
        """Place the points by the turns that all have answered; answers and stores nothing but tables and figure.

        Raises ConfigError if there is none yet.
        """
        turns = next(
            (turn for turn in range(self._turns) if any(each.work.get(turn) for each in self._under)), self._turns
        )
        if not turns:
            raise ConfigError(f"{self.folder}: not all points have answered their first {1 / self._turns:.0%} yet")
        scored = [(each, each.job.score(turns / self._turns)) for each in self._under]
        return {**self._place(scored, by, within), "so_far": turns / self._turns}

    def _finish(self, by: pareto.Speed, within: float, answered: int, seconds: float) -> Nested:
        """Score every point, place them all, write tables, figure and result."""
        scored = []
        for under in self._under:
            folder = under.job.opened.folder
            if under.stopped is not None:
                records = under.job.score(held_share(under, self._turns))
            else:
                if not (folder / RESULT).exists():
                    under.job.work()
                records = list(read_samples(folder))
            scored.append((under, records))
        result = self._place(scored, by, within)
        result |= {"answered_now": answered, "wall_seconds": round(seconds, 3)}
        write_json(self.folder / RESULT, result)
        return result

    def _place(self, scored: list[tuple[Under, list[Record]]], by: pareto.Speed, within: float) -> Nested:
        """Points by score and speed; writes tables and figure."""
        from . import frontier_files

        lost = {f"{under.name}: {r['key']}": r["lost"] for under, records in scored for r in records if "lost" in r}
        points = [point_of(under, records) for under, records in scored]
        for point in points:
            if not point.samples:
                raise RunError(f"{point.name}: every sample was given up ({next(iter(lost.values()), '')})")
        placed, baseline = pareto.measure(points, by=by), self._baseline
        frontier_files.write_tables(placed, self.folder)
        drawn = frontier_files.draw(placed, self.folder, by=by, baseline=baseline)
        best = pareto.best(placed, baseline=baseline, within=within, by=by)
        return {
            "id": self.plan.id,
            "by": by,
            "baseline": baseline,
            "points": [_row(place, under) for place, under in zip(placed, self._under, strict=True)],
            "frontier": pareto.frontier(placed, by),
            "within": within,
            "best": best.name if best else None,
            "aup": _areas(placed, self._under),
            "lost": lost,
            "health": [{"point": u.name, **gate} for u, records in scored for gate in u.job.health(records)],
            "figure": drawn,
        }


def _open_enough(points: int) -> None:
    """See that a file to write and one to read may be open for each point. Raises ConfigError where they may not."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * points + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise ConfigError(
                f"a sweep of {points} points needs {need} open files, and {hard} are allowed: raise ulimit -n, or take "
                "fewer points at a time"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _areas(placed: list[pareto.Placed], under: list[Under]) -> dict[str, float]:
    """Area under the accuracy-parallelism curve of each decoder's points (see `pareto.aup`)."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for place, each in zip(placed, under, strict=True):
        if place.tokens_per_forward is not None and place.stopped is None:
            pairs[each.planned.spec.decoder.name].append(
                (place.tokens_per_forward.mean, min(100.0, 100 * place.score.mean))
            )
    return {decoder: pareto.aup(found) for decoder, found in pairs.items() if len(dict(found)) > 1}


def _row(place: pareto.Placed, under: Under) -> Mapping[str, Any]:
    """A point of the result."""
    values = {name: found.to_dict() if isinstance(found, Interval) else found for name, found in vars(place).items()}
    return {**values, "settings": dict(place.settings), "folder": f"{POINTS}/{under.planned.spec.id}"}
