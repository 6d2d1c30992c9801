"""Whoever dies, every request is answered once or quarantined; only what kills its workers alone is quarantined."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.common.spec import build_spec
from fluid_eval.running import ray_pool
from fluid_eval.running.chunks import Chunk, FailedRequest
from fluid_eval.running.ray_pool import RayPool, WorkerActor
from fluid_eval.sweeps.sweep import Sweep
from fluid_model import ConfigError, Generation, Request
from fluid_model.common.errors import RunError
from fluid_model.engine.records import Trace


class DiedError(Exception):
    """As Ray tells that a worker is gone."""


class FailedError(DiedError):
    """As Ray tells what a worker raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Stream:
    """Answers of a chunk, a parcel at a time; a poisoned request, or chance, kills the worker."""

    def __init__(self, world: World, actor: FakeActor, work) -> None:
        self.world, self.actor, self.left = world, actor, list(work)

    def __next__(self):
        world = self.world
        world.steps += 1
        if self.actor.dead or (world.steps in world.deaths):
            self.actor.dead = True
            raise DiedError("the actor died")
        if not self.left:
            raise StopIteration
        part, self.left = self.left[: world.parcel], self.left[world.parcel :]
        for item in part:
            if item.key in world.killers:
                self.actor.dead = True
                raise DiedError("the actor died")
            if item.key in world.raisers:
                raise FailedError(world.error)
        return [Generation(item.key, (1,), "x", "eos", Trace(), 0.0) for item in part]


class FakeActor:
    def __init__(self, world: World) -> None:
        self.dead = False
        self.ready = SimpleNamespace(remote=lambda: ("node", self))
        start = SimpleNamespace(remote=lambda _, work: Stream(world, self, work))
        self.run = SimpleNamespace(options=lambda **_: start)


class World:
    """As much of Ray as the pool touches."""

    exceptions = SimpleNamespace(RayError=DiedError, RayTaskError=FailedError, RayActorError=DiedError)

    def __init__(self, killers=(), raisers=(), deaths=(), parcel=3, seed=0, error=None) -> None:
        self.killers, self.raisers, self.deaths, self.parcel = set(killers), set(raisers), set(deaths), parcel
        self.error = error or ValueError("no such thing")
        self.steps = self.hired = 0
        self.random = random.Random(seed)

    def remote(self, *_):
        self.hired += 1
        return FakeActor(self)

    def wait(self, refs, **_):
        return [self.random.choice(refs)], []

    def get(self, reference):
        return reference[0] if isinstance(reference, tuple) else reference

    def kill(self, actor) -> None:
        actor.dead = True

    def pool(self, size: int) -> RayPool:
        pool = RayPool.__new__(RayPool)
        pool._ray, pool._errors, pool._actor_class, pool._threads, pool.size = self, self.exceptions, self, None, size
        pool._deaths_in_row = pool._failed = 0
        pool._workers = [pool._start_worker() for _ in range(size)]
        return pool


SPEC = build_spec({"tasks": "mini", "model": "none", "engine": {"kind": "ray", "workers": 2}}).to_dict()


def chunks(count: int, size: int) -> list[Chunk]:
    work = [Request(str(n), (1,), 1) for n in range(count)]
    return [Chunk(f"p{n % 2}", SPEC, tuple(work[n : n + size])) for n in range(0, count, size)]


def ran(world: World, workers: int, given_chunks: list[Chunk]) -> tuple[list[str], dict[str, str]]:
    """Keys answered, and what was quarantined with the reason."""
    owner = {item.key: chunk.point for chunk in given_chunks for item in chunk.work}
    answered, lost = [], {}
    for point, answer in world.pool(workers).run(given_chunks):
        assert owner[answer.key] == point
        if isinstance(answer, FailedRequest):
            lost[answer.key] = answer.reason
        else:
            answered.append(answer.key)
    return answered, lost


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 60), size=st.integers(1, 20), workers=st.integers(1, 4), parcel=st.integers(1, 8),
    poison=st.sets(st.integers(0, 59), max_size=3), deaths=st.sets(st.integers(1, 80), max_size=6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_request_is_answered_once_or_given_up(count, size, workers, parcel, poison, deaths, seed):
    world = World(killers=map(str, poison), deaths=deaths, parcel=parcel, seed=seed)
    answered, lost = ran(world, workers, chunks(count, size))
    expected = {str(n) for n in poison if n < count}
    assert sorted([*answered, *lost]) == sorted(str(n) for n in range(count)), "each once"
    assert expected <= set(lost), "what always kills is quarantined"
    assert len(lost) - len(expected) <= len(deaths) // ray_pool.MAX_TRIES, "chance alone gives up next to nothing"


def test_a_killer_stands_alone_before_it_is_given_up(caplog):
    world = World(killers=["5"])
    answered, lost = ran(world, 2, chunks(16, 16))
    assert lost == {"5": "its worker died: the actor died"}
    assert len(answered) == 15
    assert world.hired == 2 + 4 + ray_pool.MAX_TRIES, "16, 8, 4, 2 together, then alone"
    assert "a Ray worker died (the actor died)" in caplog.text


def test_what_a_worker_raises_is_tried_again_too():
    _, lost = ran(World(raisers=["3"]), 2, chunks(10, 5))
    assert lost == {"3": "no such thing"}


def test_bad_input_is_told_as_it_is():
    with pytest.raises(ConfigError, match="no such setting"):
        ran(World(raisers=["3"], error=ConfigError("no such setting")), 2, chunks(10, 5))


def test_faults_that_are_nobodys_sample_end_the_run():
    with pytest.raises(RunError, match=r"more than 10 samples fail .*no such thing"):
        ran(World(raisers=map(str, range(40))), 2, chunks(40, 10))
    with pytest.raises(RunError, match="12 Ray workers died in a row"):
        ran(World(deaths=range(1, 1000)), 2, chunks(40, 10))


def test_work_not_begun_is_not_suspect():
    """A worker's second chunk goes back whole."""
    world = World(deaths=[1])
    seen: list[int] = []
    real = Stream.__init__

    def watch(self, world, actor, work):
        seen.append(len(work))
        real(self, world, actor, work)

    Stream.__init__ = watch  # type: ignore[method-assign]
    try:
        answered, lost = ran(world, 1, chunks(20, 10))
    finally:
        Stream.__init__ = real  # type: ignore[method-assign]
    assert (len(answered), lost) == (20, {})
    assert sorted(seen) == [5, 5, 10, 10, 10]


class Slow:
    """A worker that answers when it is told to."""

    def __init__(self) -> None:
        self.go, self.threads = threading.Event(), set()

    def facts(self, spec):
        self.threads.add(threading.get_ident())
        return {}

    def run(self, spec, work):
        self.threads.add(threading.get_ident())
        yield work[0]
        yield work[1]
        assert self.go.wait(120)
        yield from work[2:]
        raise ValueError("no more")


def test_no_answer_waits_for_another():
    """What a worker has answered leaves it, whatever the next answer takes; then comes what it raised."""

    class Own(WorkerActor):
        make = staticmethod(lambda _: Slow())

    actor = Own(1)
    sent = actor.run({}, list(range(200)))
    first = list(next(sent))
    while len(first) < 2:
        first += next(sent)
    assert first == [0, 1], "while the third is not there yet"
    actor._worker.go.set()
    rest: list[int] = []
    with pytest.raises(ValueError, match="no more"):
        rest.extend(item for parcel in sent for item in parcel)
    assert actor.facts({}) == {}
    assert len(actor._worker.threads) == 1, "torch's number of threads is a thread's own"
    assert threading.get_ident() not in actor._worker.threads


def test_a_cluster_that_does_not_start_is_told_in_a_line(monkeypatch):
    """Ray raises a plain Exception where a busy machine's node is late."""
    ray = pytest.importorskip("ray")

    def late(**_):
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = build_spec({"tasks": ["gsm8k"], "model": "tiny-ar", "engine": {"kind": "ray"}})
    with pytest.raises(ConfigError, match=r"^ray address 'local': The .* startup; try again, or use --engine inline$"):
        RayPool(spec)


@pytest.mark.cluster
def test_two_nodes_share_a_sweep(tiny_fluid, tmp_path, monkeypatch):
    """Two of Ray's nodes on this machine, one CPU each; the table is that of one process."""
    import ray
    from ray.cluster_utils import Cluster

    from fluid_eval.sweeps.grid import plan

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = {
        "tasks": ["mini_gsm8k_1"], "model": str(tiny_fluid), "decoder": "fluid", "limit": 24, "max_new_tokens": 4,
        "sweep": {"grid": {"decoder.verify": [True, False]}},
    }  # fmt: skip
    expected = Sweep(plan(values), tmp_path / "inline").work()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    pools: list[RayPool] = []
    try:
        cluster.add_node(num_cpus=1)
        engine = {"kind": "ray", "workers": 2, "ray_address": cluster.address}

        def opened(spec):
            pools.append(RayPool(spec))
            ray.get([worker.starting for worker in pools[0]._workers])  # or the first one up may answer all
            return pools[0]

        result = Sweep(plan({**values, "engine": engine}), tmp_path / "ray", open_pool=opened).work()
    finally:
        cluster.shutdown()
    assert len(pools[0].nodes) == 2
    assert [(p["name"], p["n"], p["score"]) for p in result["points"]] == [
        (p["name"], p["n"], p["score"]) for p in expected["points"]
    ]
