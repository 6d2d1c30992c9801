"""Input that nobody vouches for: whatever it is, it is read or refused in one line, and never hurts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fluid_eval
from fluid_eval.benchmarks import datasets
from fluid_eval.common.spec import build_spec
from fluid_eval.results import samples_file
from fluid_eval.results.run_folder import Run, encode, read_samples
from fluid_eval.sweeps.grid import plan, read_axis
from fluid_model import ConfigError
from fluid_model.checkpoints.hub import local_folder
from fluid_model.checkpoints.manifest import read_manifest
from fluid_model.checkpoints.source import find_checkpoint
from fluid_model.common import files
from fluid_model.common.fields import assign
from fluid_model.train.chain import build_chain
from fluid_model.train.llamafactory import read_yaml
from fluid_model.train.rows import DataSource, read_rows

DEEP = "[" * 100_000
TRACE = {"forwards": {"prefill": 1}, "slots": 1, "predicted": [], "accepted": []}
RECORD = {
    "key": "gsm8k/0", "task": "gsm8k", "doc_id": 0, "prompt": "p", "prompt_hash": "0" * 16, "output": "o",
    "output_ids": [1], "finish": "eos", "trace": TRACE, "seconds": 0.1, "scores": {"exact_match,none": 1.0},
}  # fmt: skip
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def refused_or_read(reader, *arguments):
    """What a reader makes of it; None where it refuses in words. Any other error is the test's."""
    try:
        return reader(*arguments)
    except ConfigError:
        return None


READERS = {
    "toml": files.read_toml,
    "json": files.read_json,
    "yaml": read_yaml,
    "lines": lambda file: list(files.read_lines(file)),
    "samples": lambda file: list(read_samples(file.parent)),
    "rows": lambda file: list(read_rows(DataSource(file))),
    "manifest": lambda file: read_manifest(file.parent),
    "data": lambda file: datasets._read_jsonl("gsm8k", file),
}
NAMES = {"samples": "samples.jsonl", "manifest": "fluid.json", "rows": "rows.jsonl", "data": "test.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@FUZZ
@given(content=st.binary(max_size=200) | plain.map(lambda value: json.dumps(value).encode()))
@example(content=DEEP.encode())
@example(content=b'{"a":' + DEEP.encode())
@example(content=b"a = " + DEEP.encode())
@example(content=b"\xef\xbb\xbf{}")
@example(content=b'{"question": "\\ud800", "answer": "#### 1"}')
def test_any_bytes_are_read_or_refused(tmp_path, reader, content):
    file = tmp_path / NAMES.get(reader, "file")
    file.write_bytes(content)
    refused_or_read(READERS[reader], file)


@FUZZ
@given(values=st.dictionaries(st.sampled_from(["tasks", "model", "decoder", "chat", "engine", "sweep"]), plain))
def test_any_settings_are_a_spec_or_refused(values):
    refused_or_read(build_spec, values)
    refused_or_read(plan, values)
    refused_or_read(build_chain, values)


@FUZZ
@given(text=st.text(max_size=30))
@example(text="a=" + DEEP)
@example(text="a=1,[[,2")
def test_any_text_of_a_flag_is_taken_or_refused(text):
    refused_or_read(assign, {}, text)
    refused_or_read(read_axis, text)


@FUZZ
@given(name=st.sampled_from([*RECORD, *TRACE]), value=plain)
@example(name="trace", value=[])
@example(name="scores", value=[1])
def test_a_foreign_sample_is_read_or_refused(tmp_path, name, value):
    """Its checksum is right, its fields are somebody's."""
    record = {**RECORD, "trace": {**TRACE, name: value}} if name in TRACE else {**RECORD, name: value}
    (tmp_path / "spec.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_bytes(encode(record))
    refused_or_read(fluid_eval.load_results, tmp_path)


def test_a_line_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "samples.jsonl"
    file.write_bytes(encode(RECORD) + b"x" * 5000 + b"\n" + encode({**RECORD, "key": "gsm8k/1"}))
    with pytest.raises(ConfigError, match=r"samples\.jsonl, line 2: longer than"):
        list(read_samples(tmp_path))
    zipped = tmp_path / "test.jsonl.gz"
    zipped.write_bytes(gzip.compress(b'{"question": "q", "answer": "#### 1"}\n' + b" " * 10**6))
    with pytest.raises(ConfigError, match=r"test\.jsonl\.gz, line 2: longer than"):
        datasets._read_jsonl("gsm8k", zipped)
    with pytest.raises(ConfigError, match="longer than"):
        files.read_text(zipped, max_bytes=10_000)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}\n')
    assert files.read_json(tmp_path / "a.json") == {"a": "ä"}
    assert list(files.read_lines(tmp_path / "a.json")) == [(1, '{"a": "ä"}\n')]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("config.json", {"num_hidden_layers": "x"}),
        ("config.json", {"vocab_size": []}),
        ("tokenizer.json", {"version": "x"}),
        ("tokenizer.json", {"added_tokens": 7}),
        ("tokenizer_config.json", {"bos_token": 7}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("fluid.json", {"mask_token": None}),
    ],
)
def test_a_damaged_model_is_refused(tiny_fluid, tmp_path, name, harm):
    """The libraries below raise whatever they trip over; a random search over each file found these."""
    import shutil

    from fluid_model import load

    shutil.copytree(tiny_fluid, tmp_path / "m")
    file = tmp_path / "m" / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **harm}))
    with pytest.raises(ConfigError):
        load(str(tmp_path / "m"))


def test_what_a_crash_left_of_a_long_line_is_found_from_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_file, "_STEP", 7)
    file = tmp_path / "samples.jsonl"
    for complete, torn in ((b"", b""), (b"a\n", b""), (b"", b"x" * 20), (b"abc\ndef\n", b"y" * 20), (b"\n" * 8, b"z")):
        file.write_bytes(complete + torn)
        assert samples_file.torn_bytes(file) == len(torn)
    assert samples_file.torn_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize("model", ["a\0b", "a" * 5000, "../" * 50, "owner/name/more", "", "http://x/y"])
def test_a_name_that_is_no_model_is_refused(model):
    with pytest.raises(ConfigError, match="model="):
        local_folder(model, weights=False)


@pytest.mark.parametrize("task", ["../../etc/passwd", "gsm8k/../mmlu", "", "mini\0", "a" * 5000])
def test_a_task_is_a_name_and_no_path(task):
    from fluid_eval.benchmarks.task_index import catalogue

    with pytest.raises(ConfigError, match="is unknown"):
        catalogue().check((task,))


def test_any_text_is_stored_as_it_is(tmp_path):
    """Lone surrogates, right-to-left marks, emoji, zero bytes, separators that JavaScript reads as line ends."""
    texts = ["\ud800", "\u202eabc\u202c", "\U0001f9d1\u200d\U0001f4bb", "a\0b", "\u2028\u2029", "\r\n", ""]
    run = Run(tmp_path / "r", build_spec({"tasks": "gsm8k", "model": "m"}))
    run.begin({})
    for i, text in enumerate(texts):
        run.append({**RECORD, "key": f"gsm8k/{i}", "doc_id": i, "prompt": text, "output": text})
    run.close()
    records = list(read_samples(tmp_path / "r"))
    assert [r["output"] for r in records] == [r["prompt"] for r in records] == texts
    assert len(fluid_eval.load_results(tmp_path / "r")) == len(texts)


def test_nothing_in_yaml_is_run(tmp_path):
    mark = tmp_path / "mark"
    file = tmp_path / "train.yaml"
    file.write_text(f'a: !!python/object/apply:os.mkdir ["{mark}"]')
    with pytest.raises(ConfigError, match="not a training file"):
        read_yaml(file)
    assert not mark.exists()


def test_a_pickle_that_runs_code_is_refused(tmp_path, tiny_model):
    import pickle
    import shutil

    from fluid_model import load

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "mark",)

    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "model_head.bin").write_bytes(pickle.dumps({"diffusion_k_head.0.weight": Bomb()}))
    with pytest.raises(ConfigError, match=r"model_head\.bin"):
        load(str(tmp_path / "m"))
    for name in (tmp_path / "m").glob("*.safetensors"):
        name.unlink()
    (tmp_path / "m" / "model_head.bin").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Bomb()}))
    with pytest.raises(ConfigError):
        load(str(tmp_path / "m"))
    assert not (tmp_path / "mark").exists()


def test_any_text_is_a_prompt(tiny_model, data_dir, tmp_path):
    """Lone surrogates, empty texts, zero bytes: asked, answered, stored as they were."""
    from fluid_eval.running.job import run

    texts = ["\ud800", "\u202e\U0001f9d1\u200d\U0001f4bb", "a\0b", "", "\u2028"]
    rows = [{"question": text, "answer": f"{text} #### 1"} for text in texts]
    (tmp_path / "d" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "d" / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "tasks": "gsm8k", "model": str(tiny_model), "data_dir": str(tmp_path / "d"), "num_fewshot": 1,
        "max_new_tokens": 2,
    }  # fmt: skip
    result = run(build_spec(values), tmp_path / "r")
    assert result["lines"][0]["n"] == len(texts)
    prompts = [record["prompt"] for record in read_samples(tmp_path / "r")]
    for text, prompt in zip(["\ufffd", *texts[1:]], prompts, strict=True):
        assert f"Question: {text}\nAnswer:" in prompt


@pytest.fixture
def own_code(tiny_model, tmp_path):
    """A model whose repository brings its own classes, which leave a mark when they run."""
    import shutil

    folder = tmp_path / "own_model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'mark')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_of_a_repository_runs_only_where_it_is_trusted(own_code, few_rows, tmp_path, capsys):
    from fluid_eval.cli.main import main

    words = ["run", "--tasks", "gsm8k", "--num-fewshot", "0", "--limit", "2", "--max-new-tokens", "4"]
    words += ["--data-dir", str(few_rows), "--set", "health.length_limit=1", "--set", "health.no_answer=1"]
    assert main([*words, "--model", str(own_code), "--out", str(tmp_path / "no")]) == 2
    assert "own" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "no").exists()
    assert find_checkpoint(str(own_code), weights=False).remote_code == []
    main([*words, "--model", str(own_code), "--out", str(tmp_path / "yes"), "--trust-remote-code"])
    assert (tmp_path / "mark").exists()
    ran = "own.OwnConfig, own.OwnForCausalLM"
    assert f"code of the model's repository ran: {ran}" in " ".join(capsys.readouterr().out.split())
    assert ", ".join(files.read_json(tmp_path / "yes" / "result.json")["remote_code"]) == ran


def test_trust_is_part_of_a_run_only_where_it_is_given():
    plain = build_spec({"tasks": "gsm8k", "model": "m"})
    plain_id = plain.id
    assert "trust_remote_code" not in plain.identity()["model"], "runs from before it have the same id"
    assert build_spec({"tasks": "gsm8k", "model": {"path": "m", "trust_remote_code": False}}).id == plain_id
    assert build_spec({"tasks": "gsm8k", "model": {"path": "m", "trust_remote_code": True}}).id != plain_id


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("doc_to_text = '{{ question.__class__.__mro__ }}'", "template cannot be rendered"),
        ("doc_to_text = '{{ nothing }}'", "'nothing' is undefined: the rows of its data have no such field"),
        ("doc_to_text = '{{ question'", "template cannot be rendered"),
        ("doc_to_text = '!function os.system'", "no function of Python's own"),
        ("doc_to_text = '!function fluid_eval.results.run_folder.os'", "is no function"),
        ("doc_to_text = '!function fluid_eval.nothing.x'", "no such function"),
    ],
)
def test_a_foreign_profile_reaches_the_document_alone(tiny_model, tmp_path, line, message):
    from fluid_eval.running.job import run

    (tmp_path / "p.toml").write_text(f"about = 'x'\n[tasks.mini_gsm8k]\nsource = 'x'\n{line}\n")
    values = {"tasks": "mini_gsm8k_1", "model": str(tiny_model), "profile": str(tmp_path / "p.toml"), "limit": 1}
    with pytest.raises(ConfigError, match=message):
        run(build_spec({**values, "max_new_tokens": 2}), tmp_path / "r")
