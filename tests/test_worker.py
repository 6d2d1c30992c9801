"""A worker whose device runs out of memory goes on with fewer rows at a time and loses nothing."""

from __future__ import annotations

import pytest
import torch

from fluid_eval.common.spec import build_spec
from fluid_eval.running import worker
from fluid_eval.running.job import run
from fluid_model import Request, ScoreRequest
from fluid_model.common.errors import RunError
from fluid_model.engine.loop import Engine
from fluid_model.scoring.loglikelihood import Scorer


@pytest.fixture
def little_memory(monkeypatch):
    """Forwards of more than `most` rows fail, as torch tells it on each kind of device."""
    tried: list[int] = []

    def limit(most: int, error: Exception) -> list[int]:
        def limited(kind, name):
            real = getattr(kind, name)

            def call(self, *words):
                tried.append(self.batch_size)
                for n, answer in enumerate(real(self, *words)):
                    if n == 1 and self.batch_size > most:
                        raise error
                    yield answer

            monkeypatch.setattr(kind, name, call)

        limited(Engine, "generate")
        limited(Scorer, "score")
        return tried

    return limit


def work(kind):
    if kind == "write":
        return [Request(str(n), (5, 6, 7 + n), 6) for n in range(12)]
    return [ScoreRequest(str(n), (((5, 6, 7 + n), (8,)),)) for n in range(12)]


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("kind", ["write", "score"])
@pytest.mark.parametrize("error", [CUDA, CPU])
def test_it_goes_on_with_half_the_rows(tiny_model, little_memory, kind, error):
    spec = build_spec({"tasks": "mini", "model": str(tiny_model)}).to_dict()
    expected = {answer.key: answer for answer in worker.Worker().run(spec, work(kind))}
    tried = little_memory(4, error)
    one = worker.Worker()
    answers = list(one.run(spec, work(kind)))
    assert tried == [32, 16, 8, 4]
    assert sorted(answer.key for answer in answers) == sorted(expected), "each once"
    name = "ids" if kind == "write" else "loglikelihoods"
    for answer in answers:
        assert getattr(answer, name) == pytest.approx(getattr(expected[answer.key], name), abs=1e-5)
    list(one.run(spec, work(kind)))
    assert tried[4:] == [4], "what was learnt is kept"


def test_it_gives_up_where_the_user_or_the_device_leaves_nothing(tiny_model, little_memory):
    values = {"tasks": "mini", "model": str(tiny_model)}
    little_memory(0, CUDA)
    with pytest.raises(
        RunError, match="batch_size=6: out of memory with rows of 9 tokens; pass a smaller --batch-size"
    ):
        list(worker.Worker().run(build_spec({**values, "batch_size": 6}).to_dict(), work("write")))
    with pytest.raises(RunError, match=r"batch_size=1: out of memory .*; nothing smaller is left"):
        list(worker.Worker().run(build_spec(values).to_dict(), work("write")))


def test_other_errors_are_nobodys_business(tiny_model, little_memory):
    little_memory(0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(worker.Worker().run(build_spec({"tasks": "mini", "model": str(tiny_model)}).to_dict(), work("write")))


def test_a_run_loses_no_sample(tiny_model, little_memory, tmp_path):
    little_memory(2, CUDA)
    spec = build_spec(
        {"tasks": ["mini_gsm8k_1", "mini_mmlu_1"], "model": str(tiny_model), "limit": 9, "max_new_tokens": 4}
    )
    assert {line["n"] for line in run(spec, tmp_path / "r")["lines"]} == {9}


def test_long_rows_do_not_keep_short_ones_from_being_many(tiny_model, monkeypatch):
    spec = build_spec({"tasks": "mini", "model": str(tiny_model)}).to_dict()
    work = [Request(f"long {n}", (5,) * 150 + (n,), 2) for n in range(2)]
    work += [Request(f"short {n}", (5, n), 2) for n in range(30)]
    expected = {answer.key: answer.ids for answer in worker.Worker().run(spec, work)}
    real, seen = Engine.generate, []

    def watch(self, requests):
        requests = list(requests)
        seen.append((self.batch_size, {request.key.split()[0] for request in requests}))
        return real(self, requests)

    monkeypatch.setattr(Engine, "generate", watch)
    monkeypatch.setattr(worker, "free_memory", lambda _: int(2 * 8 * 153 * 4 * 2 * 2 * 2 * 4 / 4))
    answers = {answer.key: answer.ids for answer in worker.Worker().run(spec, work)}
    assert answers == expected
    assert [kinds for _, kinds in seen] == [{"long"}, {"short"}]
    assert seen[0][0] < len(expected) <= seen[1][0]


def test_a_checkpoint_is_loaded_once_for_all_its_specs(tiny_fluid, tiny_model, monkeypatch):
    """Decoders and batch sizes share weights; several models are held while memory is ample, and none but the last
    while it is not.
    """
    loaded: list[str] = []
    real = worker.load

    def load(path, **options):
        loaded.append(path)
        return real(path, **options)

    monkeypatch.setattr(worker, "load", load)
    fluid, plain = str(tiny_fluid), str(tiny_model)
    specs = [
        {"model": fluid, "decoder": "fluid"}, {"model": fluid}, {"model": plain}, {"model": fluid, "batch_size": 2},
        {"model": {"path": plain}},
    ]  # fmt: skip
    specs = [build_spec({"tasks": "mini", **values}).to_dict() for values in specs]
    one = worker.Worker()
    for spec in specs:
        assert len(list(one.run(spec, work("write")))) == 12
    assert loaded == [fluid, plain]
    monkeypatch.setattr(worker, "free_memory", lambda _: 10**6)
    monkeypatch.setattr(worker, "weights_bytes", lambda _: 10**6)
    loaded.clear()
    one = worker.Worker()
    for spec in specs:
        one.facts(spec)
    assert loaded == [fluid, plain, fluid, plain]


def test_a_spec_gets_the_k_head_of_its_tau(tmp_path):
    from fluid_model import save

    from .tiny import fluid_checkpoint

    save(fluid_checkpoint(tau=(2.8, 1.0)), tmp_path / "two")
    one = worker.Worker()
    for tau, head in ((None, 0), (1.0, 1), (2.8, 0)):
        values = {"tasks": "mini", "model": {"path": str(tmp_path / "two"), "tau": tau}, "decoder": "fluid"}
        one.facts(build_spec(values).to_dict())
        assert one._checkpoint.head is one._checkpoint.heads[head]
    assert len(one._checkpoints) == 1
