"""`run --backend`: a model of lm-eval's writes the answers, under this package's tasks, store and tables."""

from __future__ import annotations

import re
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

import fluid_eval
from fluid_eval.cli.main import main
from fluid_eval.cli.options import arguments
from fluid_eval.output.terminal_sweeps import print_sweep
from fluid_eval.running import backend_pool
from fluid_eval.sweeps.grid import plan
from fluid_model import ConfigError
from fluid_model.common.errors import RunError

from .openai_stub import completion, openai_server

needs_api = pytest.mark.skipif(find_spec("tenacity") is None, reason="lm-eval's models of servers need fluid-eval[api]")

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "checkpoints" / "tiny-ar")


def local(address: str, **args) -> dict:
    """Arguments of lm-eval's local-completions for a server without a tokenizer."""
    own = {"base_url": f"{address}/v1/completions", "tokenizer_backend": "none", "tokenized_requests": False}
    return {"name": "local-completions", "args": {**own, "max_retries": 1, **args}}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A run by lm-eval's hf."""
    return fluid_eval.run(
        tasks="mini_gsm8k_1,mini_mmlu_1", limit=3, batch_size=2, out=tmp_path_factory.mktemp("hf") / "run",
        backend={"name": "hf", "args": {"pretrained": TINY, "dtype": "float32", "device": "cpu"}},
    )  # fmt: skip


@pytest.mark.slow
def test_hf_writes_here_what_it_writes_under_lm_evals_own_command(hf):
    theirs = evaluator.simple_evaluate(
        model="hf", model_args={"pretrained": TINY, "dtype": "float32"}, device="cpu", batch_size=2,
        tasks=["mini_gsm8k_1", "mini_mmlu_1"], limit=3, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(ROOT / "tasks" / "mini"), include_defaults=False),
    )  # fmt: skip
    rows = theirs["samples"]
    texts = {row["doc_id"]: row["resps"][0][0] for row in rows["mini_gsm8k_1"]}
    assert {s.doc_id: s.output for s in hf.samples if s.task == "mini_gsm8k_1"} == texts
    for row in rows["mini_mmlu_1"]:
        (ours,) = (s for s in hf.samples if s.key == f"mini_mmlu_1/{row['doc_id']}")
        assert ours.loglikelihoods == pytest.approx([float(r[0][0]) for r in row["resps"]], abs=1e-4)
    assert hf.row("mini_gsm8k_1").score == theirs["results"]["mini_gsm8k_1"]["exact_match,strict-match"]
    assert hf.row("mini_mmlu_1").score == theirs["results"]["mini_mmlu_1"]["acc,none"]


def test_tokens_and_seconds_are_known_and_forwards_are_not(hf, capsys):
    cost = hf.row("mini_gsm8k_1").cost
    assert cost.tokens == sum(s.tokens for s in hf.samples if s.tokens is not None) > 20
    assert cost.seconds > 0
    assert cost.tokens_per_second == pytest.approx(cost.tokens / cost.seconds)
    assert (cost.forwards, cost.tokens_per_forward, cost.slots, cost.length_limit_hits) == (None, None, None, None)
    (notice,) = hf.values["notices"]
    assert notice == (
        "backend hf: tokens are counted by encoding the answers again; seconds are wall time of its calls; "
        "forwards are not known"
    )
    assert hf.decoder == {"name": "hf"}
    assert re.search(r"mini_gsm8k_1 +[\d,]+ +– +–", repr(hf))


def test_a_backend_stands_beside_a_decoder(hf, tmp_path):
    ours = fluid_eval.run(
        tasks="mini_gsm8k_1,mini_mmlu_1", model=TINY, limit=3, batch_size=2, out=tmp_path / "ours",
        **{"model.dtype": "float32", "model.device": "cpu"},
    )  # fmt: skip
    (pair,) = fluid_eval.compare(hf, ours).values["pairs"]
    assert pair["speed"]["tokens_per_forward"] is None
    assert pair["speed"]["not_compared"] == []
    assert pair["speed"]["tokens_per_second"]["ratio"] > 0
    assert "the base was written by hf: tokens over wall time of its calls" in pair["speed"]["cautions"]
    assert [entry["difference"]["mean"] for entry in pair["tasks"]] == [0, 0]
    audit = fluid_eval.audit(hf)  # of text: both are greedy AR of the same weights
    assert (audit.verdict, audit.n) == ("identical", 3)
    assert fluid_eval.report(hf, ours, output=tmp_path / "page.html").exists()


@needs_api
def test_a_server_s_usage_and_ends_are_kept_and_its_missing_ones_stay_unknown(tmp_path):
    tokens, begun = {0: 7, 1: None, 2: 11}, list[float]()

    def respond(request):
        begun.append(time.perf_counter())
        time.sleep(0.3)
        number = len(asked) - 1
        return 200, completion(f" It is {number}.\n#### {number}", "length" if number == 2 else "stop", tokens[number])

    with openai_server(respond) as (address, asked):
        result = fluid_eval.run(
            tasks="mini_gsm8k_1", limit=3, out=tmp_path / "run", model="served", backend=local(address)
        )  # fmt: skip
    assert {sample.tokens for sample in result.samples} == {7, None, 11}
    assert 0.9 <= sum(sample.seconds for sample in result.samples) < 2 * (begun[-1] - begun[0] + 0.3)
    assert sorted(sample.finish for sample in result.samples) == ["length", "stop", "stop"]
    cost = result.row("mini_gsm8k_1").cost
    assert (cost.tokens, cost.tokens_per_second, cost.length_limit_hits) == (None, None, 1)
    assert cost.seconds > 0
    assert [one["model"] for one in asked] == ["served"] * 3
    assert asked[0]["max_tokens"] == 160
    assert "Question:" in asked[0]["stop"]


@needs_api
def test_what_is_answered_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(backend_pool, "ROWS_A_CALL", 1)
    broken = [2]

    def respond(request):
        if len(asked) == broken[0]:
            return 500, {"error": "down"}
        return 200, completion(f" #### {len(asked)}")

    with openai_server(respond) as (address, asked):
        settings = {"tasks": "mini_gsm8k_1", "limit": 3, "out": tmp_path / "run", "model": "served"}
        with pytest.raises(RunError, match=r"^backend local-completions: .*; what is answered is stored, --resume"):
            fluid_eval.run(**settings, backend=local(address))
        first = asked[0]["prompt"]
        broken[0] = 0
        result = fluid_eval.run(**settings, backend=local(address), resume=True)
    assert [one["prompt"] for one in asked].count(first) == 1
    assert len(asked) == 4
    assert len(result.samples) == 3


@needs_api
def test_a_chat_server_gets_messages(tmp_path):
    with openai_server(lambda request: (200, completion("#### 4", chat=True))) as (address, asked):
        backend = {
            "name": "local-chat-completions",
            "args": {"base_url": f"{address}/v1/chat/completions", "max_retries": 1},
        }
        result = fluid_eval.run(
            tasks="mini_gsm8k_1", limit=2, out=tmp_path / "run", model="served", backend=backend,
            chat={"system": "Be short."},
        )  # fmt: skip
    assert [m["role"] for m in asked[0]["messages"]] == ["system", "user"]
    assert result.samples[0].output == "#### 4"
    assert result.samples[0].tokens == 7
    assert result.values["chat"] == {"template": "local-chat-completions's", "system": "Be short."}


@needs_api
def test_an_answer_without_content_has_failed(tmp_path):
    with openai_server(lambda request: (200, completion(None))) as (address, _):
        result = fluid_eval.run(
            tasks="mini_gsm8k_1", limit=1, out=tmp_path / "run", model="served", backend=local(address)
        )  # fmt: skip
    assert result.failed == {"mini_gsm8k_1/0": "the server returned an answer without content"}


def test_arguments_are_read_as_lm_eval_reads_them():
    assert arguments("a=1,b=0.5,c=True,d=none,e=x=y,") == {"a": 1, "b": 0.5, "c": True, "d": None, "e": "x=y"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "hff", "--model", "M"], "backend='hff' is no model of lm-eval's; it has .*hf"),
        (["--backend", "hf", "--model", "M", "--decoder", "fluid"], "decoder=fluid: backend hf writes the answers"),
        (["--backend", "hf", "--model", "M", "--set", "decoder.confidence=0.5"], "decoder=confidence: backend hf"),
        (["--backend", "hf", "--model", "M", "--dtype", "float32"], "give it as --backend-args dtype="),
        (["--backend", "hf", "--model", "M", "--engine", "ray"], "engine.kind=ray: backend hf runs in this process"),
        (["--backend", "hf", "--model", "M", "--backend-args", "pretrained=N"], "model=M, and N in --backend-args"),
        (["--backend", "hf", "--model", "M", "--backend-args", "dtype"], "--backend-args 'dtype': write NAME=VALUE"),
        (["--backend", "hf", "--model", "M", "--speed-repeats", "5"], "answers of backend hf are timed once"),
        (["--backend", "hf", "--model", "no/such"], "backend hf with .*no/such"),
        (["--backend", "hf"], "pass --model FOLDER_OR_HUB_ID"),
        (["--backend-args", "a=1", "--model", "M"], "--backend-args: name the backend too"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["run", "--tasks", "mini_gsm8k_1", "--limit", "1", "--out", str(tmp_path / "run"), *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fluid-eval: ")
    assert re.search(message, last)
    assert not (tmp_path / "run").exists()


@needs_api
def test_a_served_baseline_stands_on_a_sweep_s_frontier(tmp_path, capsys):
    """Beside decoders: its score and tokens/s by wall time, dashes for what needs forwards."""
    with openai_server(lambda request: (200, completion(" It is 4.\n#### 4"))) as (address, asked):
        served = {"backend": local(address), "model.path": "served"}
        result = fluid_eval.sweep(
            tasks="mini_gsm8k_1", model=TINY, limit=4, max_new_tokens=6, out=tmp_path / "sweep",
            grid={"decoder.name": ["ar"]}, points=[served], **{"model.dtype": "float32"},
        )  # fmt: skip
        assert len(asked) == 4
    ar, point = result.values["points"]
    assert (ar["name"], point["name"]) == ("ar", "local-completions no tokenized_requests max_retries=1 served")
    assert [request["model"] for request in asked] == ["served"] * 4
    stored = fluid_eval.load_results(tmp_path / "sweep" / point["folder"])
    assert point["tokens_per_second"]["mean"] == pytest.approx(4 * 7 / stored["seconds"].sum())
    assert (point["tokens_per_forward"], point["forwards_per_answer"]) == (None, None)
    assert result.values["baseline"] == "ar"
    areas = {row["method"]: row for row in result.values["areas"]}
    assert areas["served, backend local-completions"]["mean"] is None
    assert areas["served, backend local-completions"]["tasks"]["mini_gsm8k_1"]["why"].startswith("not computed")
    assert "not known" not in areas["tiny-ar, ar"]["tasks"]["mini_gsm8k_1"]["why"]

    # by a speed that needs forwards it is left out, in a sentence
    counted = fluid_eval.sweep(
        tasks="mini_gsm8k_1", model=TINY, limit=4, max_new_tokens=6, out=tmp_path / "sweep", resume=True,
        by="tokens_per_forward", grid={"decoder.name": ["ar"]}, points=[served], **{"model.dtype": "float32"},
    )  # fmt: skip
    sentence = f"Left out, without tokens/forward (forwards of a backend are not known): {point['name']}"
    assert counted.values["left_out"] == sentence
    assert sentence in counted.values["caption"]
    capsys.readouterr()
    print_sweep(counted.values, tmp_path / "sweep")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(sentence) == 2, "a line of its own, and the caption"
    assert printed.index("ar ") < printed.index(point["name"]), "those without that speed come last"


def test_a_backend_point_has_no_settings_of_decoders_and_its_own_pool():
    base = {
        "tasks": "mini_gsm8k_1",
        "model": {"path": "checkpoints/tiny-fluid", "dtype": "float32"},
        "decoder": "fluid",
    }
    grid = {"backend.name": ["hf"], "decoder.confidence": [0.5, 0.9], "model.tau": [1.0, 4.0]}
    (point,) = plan({**base, "engine": {"kind": "ray"}, "sweep": {"grid": grid}}).points
    assert (point.spec.writer, point.spec.model.dtype, point.spec.engine.kind) == ("hf", "auto", "inline")
    assert point.name == "hf"
    other = plan(
        {
            "tasks": "mini_gsm8k_1",
            "model": TINY,
            "backend": "hf",
            "sweep": {"point": [{"decoder.name": "ar"}, {"batch_size": 2}]},
        }
    )
    assert [p.spec.writer for p in other.points] == ["ar", "hf"]
    with pytest.raises(ConfigError, match="decoder=ar: backend hf writes the answers; name one of both"):
        plan({**base, "sweep": {"point": [{"backend.name": "hf", "decoder.name": "ar"}]}})


@pytest.mark.slow
def test_the_page_s_commands_run(tmp_path, monkeypatch, capsys):
    """Each command of docs/backends.md that needs no server, in its order."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "backends.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = [line.split() for block in blocks for line in block.splitlines()]
    assert len(commands) >= 3
    for _, *words in commands:
        assert main(words) in (0, 3), (words, capsys.readouterr().err)
