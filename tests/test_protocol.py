"""Conventions by name: what a profile changes, what a result tells of it, and stored answers read by another's."""

from __future__ import annotations

import hashlib
import json

import pytest

from fluid_eval.analysis.rescore import rescore
from fluid_eval.benchmarks import evalscope_gsm8k, lm_eval_tasks, profiles
from fluid_eval.cli import EXIT_UNHEALTHY
from fluid_eval.cli.main import main
from fluid_eval.cli.options import BUNDLED
from fluid_eval.common.paths import resource
from fluid_eval.common.spec import build_spec
from fluid_eval.results import run_folder
from fluid_eval.running.job import run
from fluid_model import ConfigError

BASE = {"tasks": ["gsm8k"], "model": "m"}
AS_FLUID = {"thinking": True, "read_thoughts": True, "multiturn": False}
PUBLIC_PROMPT = "68883d40479c68012540ea5084092bd9b0c60792bb92a38f560f319968b75b9a"
LAST = """
about = "the last number"
metric_list = [{ metric = "exact_match", aggregation = "mean", higher_is_better = true, regexes_to_ignore = ["(?s).*#### "] }]
filter_list = [{ name = "last", filter = [{ function = "regex", regex_pattern = "([0-9]+)$" }, { function = "take_first" }] }]
"""  # noqa: E501
BOXED = """
about = "the last box"
metric_list = [{ metric = "exact_match", aggregation = "mean", higher_is_better = true }]
process_results = "!function tests.test_protocol.holds_a_box"
extract = "!function fluid_eval.benchmarks.lm_eval_tasks.boxed_answer"
"""


def holds_a_box(doc, results):
    return {"exact_match": int("\\boxed" in results[0])}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two questions of GSM8K's form, and enough to draw examples from."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "gsm8k").mkdir()
    for split, count in (("train", 6), ("test", 2)):
        lines = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1\n#### {n + 1}"} for n in range(count)]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def built(rows, **changes):
    spec = build_spec({**BASE, "data_dir": str(rows), **changes})
    tasks = lm_eval_tasks.load_tasks(spec)
    protocol = profiles.describe(spec, tasks["tasks"], {"gsm8k": ["gsm8k"]}, None)
    return tasks["tasks"]["gsm8k"], protocol


def write(folder, text, name="mine.toml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_default_profile_is_no_part_of_an_identity_and_others_are():
    spec = build_spec(BASE)
    assert spec.id == "d7cbffa1d78f", "what runs from before there were profiles are stored under"
    assert build_spec({**BASE, "profile": "lm-eval"}).id == spec.id
    other = build_spec({**BASE, "profile": "minimal"})
    assert other.id != spec.id != build_spec({**BASE, "extractor": "minimal"}).id != other.id
    before = {name: value for name, value in spec.to_dict().items() if name not in ("profile", "extractor")}
    assert build_spec(before) == spec
    assert build_spec(other.to_dict()) == other


def test_profiles_change_what_they_say_and_nothing_else(rows, tmp_path):
    _, protocol = built(rows)
    lm_eval = protocol["tasks"]["gsm8k"]
    assert (protocol["name"], lm_eval["num_fewshot"], lm_eval["max_gen_toks"]) == ("lm-eval", 5, 512)
    task, paper = built(rows, profile="fluid-paper", chat=AS_FLUID)
    one = paper["tasks"]["gsm8k"]
    assert (one["num_fewshot"], one["max_gen_toks"], one["until"]) == (4, 7000, [])
    assert one["extractors"] == {"none": "fluid_eval.benchmarks.evalscope_gsm8k.results"}
    assert task.get_config("generation_kwargs")["do_sample"] is False, "what a profile leaves out stays"
    assert one["version"] == protocol["tasks"]["gsm8k"]["version"]
    _, silent = built(rows, profile=write(tmp_path, 'about = "x"\n[tasks.mmlu]\nsource = "y"\n'))
    assert silent["tasks"]["gsm8k"]["source"] == "not stated; lm-eval's used"
    assert silent["hash"] == protocol["hash"]


def test_fluids_prompt_is_that_of_its_public_evaluation(rows):
    """EvalScope at commit fde259d2 (its words since ae18072a, v1.3.0) builds this from the same rows: one user turn,
    the first four train rows in order; its text's SHA-256 was taken from that code.
    """
    spec = build_spec(profiles.chat_of({**BASE, "data_dir": str(rows), "profile": "fluid-paper"}))
    turns = []
    task = lm_eval_tasks.load_tasks(spec)["tasks"]["gsm8k"]
    for doc in task.test_docs():
        task.fewshot_context(
            doc,
            num_fewshot=4,
            apply_chat_template=True,
            fewshot_as_multiturn=spec.chat.multiturn,
            chat_template=lambda messages, **_: turns.append(messages) or "",
        )
    assert [[turn["role"] for turn in each] for each in turns] == [["user"], ["user"]]
    first, second = (each[0]["content"] for each in turns)
    shown = "\n\n".join(f"What is {n} + 1?\n\nReasoning:\n{n} + 1\n\nANSWER: \\boxed{{{n + 1}}}" for n in range(4))
    asked = "What is {} + 1?\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    head = "Here are some examples of how to solve similar problems:\n\n"
    assert first == f"{head}{shown}\n\n{asked.format(0)}"
    assert second == f"{head}{shown}\n\n{asked.format(1)}"
    assert hashlib.sha256(first.encode()).hexdigest() == PUBLIC_PROMPT
    assert spec.chat.thinking
    assert spec.chat.read_thoughts, "</think> is not what openPangu writes: nothing is cut"


@pytest.mark.parametrize(
    ("text", "extracted", "right"),
    [
        ("so 7. \\boxed{5} no: $\\boxed{18}$ dollars", "18", True),
        ("thoughts \\boxed{18} [unused17] Done.", "18", True),
        ("\\boxed{18", "18", True),
        ("The answer is 20. ANSWER: 18", "20ANSWER:18", False),
        ("Then the answer is $18.00.", "18", True),
        ("ANSWER: 5\nANSWER: 18", "18", True),
        ("18 eggs, which are 1,800 cents", "1800", True),
        ("It is 1,801", "1801", False),
        ("\\boxed{\\text{18}}", "18", True),
        ("\\boxed{18\\%}", "18", True),
        ("\\boxed{\\frac{36}{2}}", "\\frac{36}{2}", True),
        ("\\boxed{0.18}", "0.18", True),
        ("\\boxed{x = 18}", "18", True),
        ("\\boxed{18 apples}", "18apples", False),
        ("nothing", "", False),
        ("", "", False),
    ],
)
def test_answers_are_read_as_evalscope_reads_them(text, extracted, right):
    """As EvalScope's parser at fde259d2 scored each of these texts against 18."""
    assert evalscope_gsm8k.answer(text) == extracted
    assert evalscope_gsm8k.results({"answer": "10 + 8\n#### 18"}, [text]) == {"exact_match": int(right)}


def test_thoughts_are_read_only_where_the_convention_reads_them():
    """The setting is part of a run's identity where it is used, and runs from before there was any keep theirs."""
    for chat, message in (({"read_thoughts": True}, "needs chat.thinking=true"), (
        {**AS_FLUID, "end_of_thinking": "%"}, "no end"
    )):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            build_spec({**BASE, "chat": chat})
    thinks = build_spec({**BASE, "chat": {"thinking": True}})
    assert "read_thoughts" not in thinks.identity()["chat"]
    assert build_spec({**BASE, "chat": {**AS_FLUID, "multiturn": True}}).id != thinks.id


def test_every_bundled_profile_is_read_and_says_where_it_is_from():
    assert profiles.known_profiles() == ["fluid-paper", "llada", "lm-eval", "minimal"]
    for name in profiles.known_profiles():
        profile = profiles.read_profile(name)
        assert profile.about
        assert all(task.source for task in profile.tasks.values())


def test_one_hash_means_asked_and_read_alike(rows, tmp_path):
    _, plain = built(rows)
    renamed = write(tmp_path, 'about = "x"\n[tasks.gsm8k]\nsource = "y"\nnum_fewshot = 5\n')
    _, same = built(rows, profile=renamed)
    assert same["hash"] == plain["hash"], "neither name nor source is part of what was done"
    hashes = {plain["hash"]}
    for change in (
        "num_fewshot = 4", 'doc_to_text = "{{question}}"', "until = []", "max_gen_toks = 9",
        'fewshot_config = { doc_to_target = "x" }',
        'description = "x"', f"[tasks.gsm8k.extractor]{LAST}",
    ):  # fmt: skip
        _, other = built(rows, profile=write(tmp_path, f'about = "x"\n[tasks.gsm8k]\nsource = "y"\n{change}\n'))
        hashes.add(other["hash"])
    assert len(hashes) == 8, "each field counts"
    _, fewer = built(rows, num_fewshot=1)
    assert fewer["name"] == "lm-eval+num_fewshot=1"
    assert fewer["hash"] not in hashes


def test_whatever_decides_what_is_asked_is_in_the_template(rows):
    spec = build_spec({**BASE, "data_dir": str(rows)})
    task = lm_eval_tasks.load_tasks(spec)["tasks"]["gsm8k"]

    def template():
        protocol = profiles.describe(spec, {"gsm8k": task}, {"gsm8k": ["gsm8k"]}, None)
        return protocol["tasks"]["gsm8k"]["template"]

    templates = {template()}
    for name in (
        "description", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix", "fewshot_split",
        "fewshot_delimiter", "target_delimiter", "process_docs",
    ):  # fmt: skip
        before = task.get_config(name)
        task.set_config(key=name, value="other")
        templates.add(template())
        task.set_config(key=name, value=before)
    assert len(templates) == 10


def test_the_longest_name_that_covers_a_task_counts():
    protocols = {name: profiles.TaskProtocol(name) for name in ("mmlu", "mmlu_anatomy")}
    profile = profiles.Profile("x", "", protocols)
    assert [profile.key_for(name) for name in ("mmlu_anatomy", "mmlu_virology", "mmlu", "mmlupro")] == [
        "mmlu_anatomy", "mmlu", "mmlu", None,
    ]  # fmt: skip


def test_a_profile_that_writes_chats_makes_the_run_one():
    values = {**BASE, "profile": "fluid-paper"}
    assert profiles.chat_of(values)["chat"]["thinking"] is True
    assert profiles.chat_of({**values, "chat": {}})["chat"] == {}, "what the user sets stays"
    assert "chat" not in profiles.chat_of({**BASE, "profile": "minimal"})
    with pytest.raises(ConfigError, match="writes gsm8k as a chat and the other tasks not; run them apart"):
        profiles.chat_of({**values, "tasks": "gsm8k,math500"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about = 'x'\n[tasks.gsm8k]\nsource = 'y'\nshots = 3", "tasks.gsm8k.shots is no setting; known: tasks.gsm8k."),
        ("about = 'x'\n[tasks.gsm8k]\nnum_fewshot = 3", "tasks.gsm8k.source is missing"),
        ("about = 'x'\n[tasks.gsm8k]\nsource = 'y'\nnum_fewshot = -3", "num_fewshot=-3 must be at least 0"),
        ("about = 'x'\ntasks = 3", "tasks must be tables"),
        ("about = 'x'\n[tasks.gsm9k]\nsource = 'y'", "tasks.gsm9k covers no task"),
        ("about = 'x'\n[tasks.gsm8k]\nsource = 'y'\ndoc_to_text = '!function no.such'", "no such function"),
    ],
)
def test_what_is_wrong_with_a_profile_is_named(rows, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        built(rows, profile=write(tmp_path, text))
    with pytest.raises(ConfigError, match="profile='nothing' is unknown; known: fluid-paper, llada, lm-eval, minimal"):
        built(rows, profile="nothing")


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A finished run of the bundled checkpoint: it writes, and it compares likelihoods."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    values = {"tasks": ["mini_gsm8k_1", "mini_mmlu_1"], "model": str(resource("checkpoints") / BUNDLED), "limit": 4}
    return folder, run(build_spec({**values, "decoder": {"name": "fluid", "slot_budget": 64}}), folder)


def forbid(*_):
    raise AssertionError("a model was loaded")


def test_read_again_by_its_own_extractors_nothing_changes_and_no_model_is_loaded(answered, tmp_path, monkeypatch):
    folder, result = answered
    assert result["protocol"]["name"] == "lm-eval"
    for door in ("fluid_eval.running.job.open_pool", "fluid_model.checkpoints.checkpoint.load_tokenizer"):
        monkeypatch.setattr(door, forbid)
    again, out = rescore(folder, "lm-eval", tmp_path / "again")
    assert (out / run_folder.SAMPLES).read_bytes() == (folder / run_folder.SAMPLES).read_bytes()
    for name in ("lines", "protocol", "spec_id", "members", "parts", "health"):
        assert again[name] == result[name], name


def test_another_extractor_flips_what_it_must_and_says_what_it_is(answered, tmp_path):
    """Answers end in `#### n`: there is a last number and no box."""
    folder, result = answered
    mine = 'about = "x"\n[tasks.mini_gsm8k]\nsource = "y"\nnum_fewshot = 3\n[tasks.mini_gsm8k.extractor]\n'
    boxed, out = rescore(folder, write(tmp_path, mine + BOXED), tmp_path / "boxed")
    (line,) = [line for line in boxed["lines"] if line["task"] == "mini_gsm8k_1"]
    assert (result["lines"][0]["score"], line["score"]) == (1.0, 0.0)
    assert boxed["protocol"]["name"] == "lm-eval prompts, mine extractors"
    assert boxed["protocol"]["hash"] != result["protocol"]["hash"]
    assert boxed["lines"][-1] == result["lines"][-1], "tasks the profile does not name stay"
    assert any("not applied" in notice and "num_fewshot" in notice for notice in boxed["notices"])
    assert run_folder.held_spec(out).extractor.endswith("mine.toml")
    last, _ = rescore(out, write(tmp_path, mine + LAST, "last.toml"), tmp_path / "last")
    assert last["lines"][0]["score"] == 1.0, "a folder that was read again can be read again"


def test_an_unhealthy_reading_ends_as_an_unhealthy_run_does(answered, tmp_path, capsys):
    """No answer has a box: the gate is over its threshold, and the command offers no setting that it does not take."""
    mine = write(tmp_path, 'about = "x"\n[tasks.mini_gsm8k]\nsource = "y"\n[tasks.mini_gsm8k.extractor]\n' + BOXED)
    assert main(["rescore", str(answered[0]), "--profile", mine, "--out", str(tmp_path / "o")]) == EXIT_UNHEALTHY
    out = capsys.readouterr().out
    assert "exit code 3, by the thresholds of the run that was read" in out
    assert "--set" not in out


def test_only_the_answers_to_these_questions_are_read(answered, tmp_path):
    folder, _ = answered
    with pytest.raises(ConfigError, match="has no extractor of its own for mini_gsm8k_1, mini_mmlu_1"):
        rescore(folder, "minimal", tmp_path / "none")
    with pytest.raises(ConfigError, match="no finished run here"):
        rescore(tmp_path, "minimal")
    (tmp_path / "sweep" / "points").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a sweep, not a run; name one of the run folders in "):
        rescore(tmp_path / "sweep", "minimal")
    for number, change in enumerate(({"prompt": "What else?"}, {"key": "mini_gsm8k_1/99"})):
        other = tmp_path / f"other{number}"
        other.mkdir()
        for name in (run_folder.SPEC, run_folder.ENVIRONMENT, run_folder.RESULT):
            (other / name).write_bytes((folder / name).read_bytes())
        first, *rest = run_folder.read_samples(folder)
        (other / run_folder.SAMPLES).write_bytes(b"".join(map(run_folder.encode, [{**first, **change}, *rest])))
        with pytest.raises(ConfigError, match=r"has changed since it was answered|holds no answer to"):
            rescore(other, "lm-eval", tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()
