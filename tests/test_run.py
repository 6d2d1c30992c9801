"""The main job on real weights and real benchmarks, whole."""

from __future__ import annotations

import numpy as np
import pytest

import fluid_eval
from fluid_eval.common.spec import build_spec
from fluid_eval.results import run_folder
from fluid_eval.running import job as job
from fluid_eval.running.job import run
from fluid_eval.running.ray_pool import RayPool
from fluid_eval.running.workers import open_pool

LIMIT = 2
"""Documents of a task, and of each of MMLU's 57 subjects."""
ON_RAY = {"kind": "ray", "workers": 2}


def spec_for(stories, data_dir, **changes):
    values = {
        "tasks": ["gsm8k", "math500", "humaneval", "mmlu"],
        "model": {"path": str(stories)},
        "data_dir": str(data_dir),
        "num_fewshot": 0,
        "limit": LIMIT,
        "max_new_tokens": 24,
        "allow_unsafe_code": True,
    }
    return build_spec({**values, **changes})


@pytest.fixture(scope="module")
def four_tasks(stories, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "four"
    return folder, run(spec_for(stories, data_dir), folder)


def test_four_tasks_from_one_call(four_tasks):
    folder, result = four_tasks
    assert [(line["task"], line["metric"], line["n"]) for line in result["lines"]] == [
        ("gsm8k", "exact_match", LIMIT),
        ("gsm8k", "exact_match", LIMIT),
        ("math500", "exact_match", LIMIT),
        ("math500", "math_verify", LIMIT),
        ("humaneval", "pass@1", LIMIT),
        ("mmlu", "acc", LIMIT * 57),
    ]
    assert len(result["parts"]) == 4 + 57
    assert len(result["data"]) == 6
    assert all(message.startswith("matches the canonical") for message in result["data"])
    gsm8k = result["lines"][0]
    assert (gsm8k["tokens"], gsm8k["forwards"], gsm8k["tokens_per_forward"]) == (24 * LIMIT, 24 * LIMIT, 1.0)
    where = run_folder.read_json(folder / "environment.json")
    assert where["versions"]["torch"]
    assert (where["engine"]["device"], where["engine"]["dtype"], where["engine"]["parameters"]) == (
        "cpu",
        "float32",
        260032,
    )
    kind, reason = where["engine"]["forward_kind"], where["engine"]["forward_reason"]
    assert (kind == "compiled") == (where["engine"]["forward"] == "compiled")
    assert kind in ("compiled", "explicit")
    assert reason


def test_a_sample_says_all_about_itself(four_tasks):
    folder, _ = four_tasks
    records = {record["key"]: record for record in run_folder.read_samples(folder)}
    assert len(records) == (3 + 57) * LIMIT
    first = records["gsm8k/0"]
    assert first["prompt"].startswith("Question: Janet")
    assert (len(first["output_ids"]), first["finish"]) == (24, "length")
    assert first["trace"]["forwards"] == {"prefill": 1, "denoise": 0, "verify": 0, "commit": 23, "round": 0}
    assert first["extracted"].keys() == {"strict-match", "flexible-extract"}
    assert first["target"].endswith("#### 18")
    assert records["humaneval/0"]["extracted"]["create_test"].startswith("from typing import List")
    question = records["mmlu_anatomy/1"]
    assert question["trace"]["forwards"]["prefill"] == 1, "one forward a question, not four"
    assert question["output"] == "ABCD"[int(np.argmax(question["loglikelihoods"]))]
    frame = fluid_eval.load_results(folder)
    assert frame.loc[frame.task == "mmlu_anatomy", "score:acc,none"].isin([0, 1]).all()


def test_group_scores_are_means_over_all_samples(four_tasks):
    """As lm-eval's groups weigh by size; test_parity compares with lm-eval's own."""
    folder, result = four_tasks
    frame = fluid_eval.load_results(folder)
    scores = frame["score:acc,none"].dropna()
    assert result["lines"][-1]["score"] == pytest.approx(scores.mean())
    stem = next(line for line in result["parts"] if line["task"] == "mmlu_stem")
    assert stem["n"] == 19 * LIMIT


def test_long_prompts_are_cut_from_the_left_and_counted(four_tasks):
    folder, result = four_tasks
    records = list(run_folder.read_samples(folder))
    cut = [record for record in records if record["truncated"]]
    assert cut, "some MMLU questions are longer than 512 tokens here"
    assert all(record["prompt_tokens"] in (512 - 24, 512) for record in cut)
    assert sum(line["truncated_prompts"] for line in result["lines"] if line["metric"] != "math_verify") >= len(cut)


def test_a_resumed_run_equals_an_unbroken_one(four_tasks, stories, data_dir, tmp_path):
    folder, unbroken = four_tasks
    broken = tmp_path / "r"
    broken.mkdir()
    for name in (run_folder.SPEC, run_folder.ENVIRONMENT):
        (broken / name).write_bytes((folder / name).read_bytes())
    kept = [record for n, record in enumerate(run_folder.read_samples(folder)) if n % 3]
    for record in kept:
        del record["scores"], record["extracted"], record["target"]
    (broken / run_folder.SAMPLES).write_bytes(b"".join(map(run_folder.encode, kept)) + b'{"torn')
    resumed = run(spec_for(stories, data_dir), broken, resume=True)
    for ours, theirs in zip(resumed["lines"] + resumed["parts"], unbroken["lines"] + unbroken["parts"], strict=True):
        for name in ("task", "score", "low", "high", "n", "tokens", "forwards"):
            assert ours[name] == theirs[name]
    assert same_samples(folder, broken) == len(list(run_folder.read_samples(folder)))
    assert resumed["notices"][1].endswith("dropped 6 bytes")


def same_samples(ours, theirs) -> int:
    """How many they are: equal texts, ids, scores and forwards; log-likelihoods to rounding (batches differ)."""
    ours, theirs = ({r["key"]: r for r in run_folder.read_samples(f)} for f in (ours, theirs))
    assert list(theirs) == [key for key in ours if key in theirs]
    for key, b in theirs.items():
        a = ours[key]
        for name in ("prompt", "output", "output_ids", "finish", "scores", "trace", "truncated"):
            assert a[name] == b[name], (key, name)
        assert a.get("loglikelihoods", []) == pytest.approx(b.get("loglikelihoods", []), abs=1e-4)
    return len(theirs)


@pytest.fixture(scope="module")
def cluster():
    """Ray's own pool, with a private cluster and two workers, started once for all runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        pool = RayPool(build_spec({"tasks": "mini", "model": "none", "engine": ON_RAY}))
    import ray

    yield pool
    assert ray.is_initialized()
    pool.close()
    assert not ray.is_initialized(), "the private cluster ends with the pool"


@pytest.fixture
def closed(cluster, monkeypatch):
    """Has runs on Ray work there; which pools they closed, which go on here."""
    pools = []

    class Kept:
        def __getattr__(self, name):
            return getattr(cluster, name)

        def close(self) -> None:
            pools.append(self)

    monkeypatch.setattr(job, "open_pool", lambda spec: Kept() if spec.engine.kind == "ray" else open_pool(spec))
    return pools


@pytest.mark.cluster
def test_ray_gives_the_same_numbers(four_tasks, stories, data_dir, tmp_path, closed):
    folder, inline = four_tasks
    tasks = ["gsm8k", "math500", "humaneval", "mmlu_anatomy"]
    spec = spec_for(stories, data_dir, tasks=tasks, engine=ON_RAY)
    assert spec.id == spec_for(stories, data_dir, tasks=tasks).id
    result = run(spec, tmp_path / "ray")
    assert len(closed) == 1, "a run closes its pool"
    before = {(line["task"], line["metric"], line["filter"]): line for line in inline["lines"] + inline["parts"]}
    assert len(result["lines"]) == 6
    for line in result["lines"]:
        assert line["score"] == before[line["task"], line["metric"], line["filter"]]["score"]
    assert same_samples(folder, tmp_path / "ray") == 4 * LIMIT
    assert run_folder.read_json(tmp_path / "ray" / "environment.json")["engine"]["workers"] == 2


@pytest.mark.parametrize("engine", [{}, pytest.param(ON_RAY, marks=pytest.mark.cluster)], ids=["inline", "ray"])
def test_what_a_worker_finds_wrong_is_told_as_it_is(tmp_path, tiny_model, few_rows, request, engine):
    from fluid_model import ConfigError

    closed = request.getfixturevalue("closed") if engine else []
    (broken := tmp_path / "m").mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"junk")
    spec = spec_for(broken, few_rows, tasks=["gsm8k"], engine=engine)
    with pytest.raises(ConfigError, match=r"^model="):
        run(spec, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert len(closed) == bool(engine), "and the pool is closed"


def test_fluid_writes_what_ar_writes_through_the_whole_path(tiny_fluid, few_rows, tmp_path):
    results = {}
    for decoder in ("ar", "fluid"):
        spec = spec_for(tiny_fluid, few_rows, tasks=["gsm8k"], decoder=decoder)
        results[decoder] = run(spec, tmp_path / decoder)
    ar, fluid = (fluid_eval.load_results(tmp_path / d) for d in ("ar", "fluid"))
    assert ar["output_ids"].tolist() == fluid["output_ids"].tolist()
    assert (fluid["forwards:round"] > 0).all()
    assert all(len(p) in (len(a), len(a) + 1) for p, a in zip(fluid["predicted"], fluid["accepted"], strict=True))
