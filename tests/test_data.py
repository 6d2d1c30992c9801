"""Benchmark data: what is canonical, where it may come from, and what is said when it is not there."""

from __future__ import annotations

import gzip
import json
import threading

import pytest

from fluid_eval.benchmarks import datasets
from fluid_model import ConfigError


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(datasets, "_loaded", {})


@pytest.mark.parametrize(("name", "split"), [(n, s) for n, source in datasets.DATASETS.items() for s in source.known])
def test_shared_data_are_the_canonical_sets(data_dir, name, split):
    rows = datasets.load_rows(name, split, str(data_dir))
    (fingerprint,) = datasets.fingerprints(str(data_dir))
    assert fingerprint.canonical
    assert fingerprint.rows == len(rows) == datasets.DATASETS[name].known[split][0]
    assert (
        fingerprint.message == f"matches the canonical {datasets.DATASETS[name].title} {split} set ({len(rows)} rows)"
    )


def test_one_changed_character_is_noticed(data_dir):
    rows = datasets.load_rows("math500", "test", str(data_dir))
    changed = [{**rows[0], "answer": rows[0]["answer"] + " "}, *rows[1:]]
    fingerprint = datasets.fingerprint("math500", "test", "folder", changed)
    assert not fingerprint.canonical
    assert fingerprint.message.startswith("WARNING: 500 rows that are not the canonical MATH500 test set")


def test_humaneval_needs_neither_folder_nor_hub(tmp_path):
    assert len(datasets.load_rows("humaneval", "test", None)) == 164
    assert len(datasets.load_rows("humaneval", "test", str(tmp_path))) == 164
    assert all(f.canonical and f.origin == "package" for f in datasets.fingerprints(None))


def test_plain_and_gzipped_files(tmp_path):
    row = {"question": "1+1?", "answer": "#### 2", "extra": 1}
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n\n")
    with gzip.open(tmp_path / "gsm8k" / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    for split in ("test", "train"):
        assert datasets.load_rows("gsm8k", split, str(tmp_path)) == [{"question": "1+1?", "answer": "#### 2"}]


@pytest.mark.parametrize("line", ["{oops", '{"question": "x"}', "3"])
def test_a_bad_row_names_file_and_line(tmp_path, line):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 1"}) + "\n" + line)
    with pytest.raises(ConfigError, match=r"test\.jsonl, line 2: not a row with question, answer"):
        datasets.load_rows("gsm8k", "test", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mmlu", {"question": "q", "subject": "s", "choices": ["a", "b"], "answer": 1}),
        ("mmlu", {"question": "q", "subject": "s", "choices": list("abcd"), "answer": 7}),
        ("gsm8k", {"question": None, "answer": "a"}),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, name, row):
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"test\.jsonl, line 1: not a row with .* cannot be one"):
        datasets.load_rows(name, "test", str(tmp_path))


CHOICES = ["red", "green", "blue", "B"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([0, 3, 2.0], [0, 3, 2]),
        (["A", "d", " C "], [0, 3, 2]),
        (["green", "blue", "A"], [1, 2, 0]),
        (["0", "3", "1"], [0, 3, 1]),
        (["4", "1", "3"], [3, 0, 2]),
        (["3", "2"], "line 1: .*answer='3' may count from 0 or from 1"),
        (["0", "4"], "line 1: .*may count from 0 or from 1"),
        ([1, "3"], "line 2: .*may count from 0 or from 1"),
        (["A", "B"], "line 2: .*answer='B' names two choices"),
        (["yellow"], "line 1: .*answer='yellow' is no choice"),
        (["7"], "line 1: .*answer='7' is no choice"),
        ([2.5], "line 1: .*answer=2.5 cannot be one"),
        ([True], "line 1: .*answer=True cannot be one"),
    ],
)
def test_answers_of_mmlu_name_one_choice_or_are_refused(tmp_path, answers, expected):
    (tmp_path / "mmlu").mkdir()
    rows = [{"question": "q", "subject": "s", "choices": CHOICES, "answer": answer} for answer in answers]
    (tmp_path / "mmlu" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=r"test\.jsonl, " + expected):
            datasets.load_rows("mmlu", "test", str(tmp_path))
    else:
        assert [row["answer"] for row in datasets.load_rows("mmlu", "test", str(tmp_path))] == expected


PROGRAM = {
    "task_id": "t/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "",
    "test": "def check(c):",
}
SOLVED = {"problem": "p", "solution": "s", "answer": "1", "subject": "x", "level": 1, "unique_id": "u"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "42"}, "has no '####' before the number"),
        ("gsm8k", {"question": "q", "answer": "so #### "}, "nothing after '####'"),
        ("math500", {**SOLVED, "answer": " "}, "answer is empty"),
        ("humaneval", {**PROGRAM, "entry_point": ""}, "entry_point='' is no name"),
        ("humaneval", {**PROGRAM, "test": "assert f()"}, "test defines no check"),
        ("humaneval", {k: v for k, v in PROGRAM.items() if k != "entry_point"}, r"\('entry_point'\)"),
    ],
)
def test_rows_that_no_answer_could_be_right_for_are_refused(tmp_path, name, row, message):
    (tmp_path / name).mkdir()
    (tmp_path / name / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"test\.jsonl, line 1: .*" + message):
        datasets.load_rows(name, "test", str(tmp_path))


def test_broken_and_empty_files_are_named(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"test\.jsonl: holds no rows"):
        datasets.load_rows("gsm8k", "test", str(tmp_path))
    packed = bytearray(gzip.compress(json.dumps({"question": "q" * 500, "answer": "a"}).encode() * 9))
    packed[15:40] = b"x" * 25
    (tmp_path / "gsm8k" / "train.jsonl.gz").write_bytes(packed)
    with pytest.raises(ConfigError, match=r"train\.jsonl\.gz: cannot be read"):
        datasets.load_rows("gsm8k", "train", str(tmp_path))


def test_missing_data_name_both_ways_out(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"gsm8k/test\.jsonl: no such file"):
        datasets.load_rows("gsm8k", "test", str(tmp_path))
    with pytest.raises(ConfigError, match="connect to the hub, or pass --data-dir DIR"):
        datasets.load_rows("gsm8k", "test", None)


def test_the_hub_is_given_up_soon(monkeypatch):
    import socket

    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr(datasets, "HUB_TIMEOUT", 0.5)
    assert not datasets.hub_reachable(), "else this never ends"
    silent.close()


def test_a_name_lookup_that_hangs_is_given_up_too(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets, "HUB_TIMEOUT", 0.2)
    end = threading.Event()
    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda *_args, **_more: end.wait())
    assert not datasets.hub_reachable(), "else this never ends"
    end.set()


def test_clients_of_the_hub_that_are_imported_already_go_offline_too(monkeypatch):
    import datasets as hub_datasets
    from huggingface_hub import constants

    for holder in (constants, hub_datasets.config):
        monkeypatch.setattr(holder, "HF_HUB_OFFLINE", False)
    datasets.go_offline()
    assert constants.HF_HUB_OFFLINE
    assert hub_datasets.config.HF_HUB_OFFLINE
