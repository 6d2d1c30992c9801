"""`fluid-train write-answers`: the model's own text, resumed to the same file, never mixed with another's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fluid_model
from fluid_model import ArSettings, ConfigError, Request
from fluid_model.train import own_answers
from fluid_model.train.cli import main
from fluid_model.train.own_answers import AnswerSettings, write_answers
from fluid_model.train.recipe import DataSpec
from fluid_model.train.rows import load_rows

from .tiny import save_model

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
SETTINGS = AnswerSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return Path(__file__).parents[1] / "checkpoints" / "tiny-ar"


def prompts_file(folder, count=30):
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"Q: {n}+1? A:", "completion": " unread"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_hold_the_models_greedy_text(model, tmp_path):
    counts = write_answers(str(model), prompts_file(tmp_path), tmp_path / "out.jsonl", SETTINGS, batch_size=4)
    rows = read(tmp_path / "out.jsonl")
    assert (counts.prompts, counts.rows, counts.rows + counts.left_out) == (30, len(rows), 30)
    checkpoint = fluid_model.load(str(model))
    for row in rows:
        prompt = tuple(checkpoint.tokenizer(f"Q: {row['row']}+1? A:")["input_ids"])
        (answer,) = fluid_model.engine_for(checkpoint, ArSettings()).generate([Request("0", prompt, 12)])
        assert (row["completion"], row["finish"]) == (answer.text, answer.finish)
    assert len(rows) > 20
    trained_on, _ = load_rows(DataSpec(files=(str(tmp_path / "out.jsonl"),), held_out=1))
    assert trained_on[0].completion == rows[0]["completion"]


def test_an_interrupted_run_goes_on_to_the_same_file(model, tmp_path, monkeypatch):
    prompts, complete, parts = prompts_file(tmp_path), tmp_path / "all.jsonl", tmp_path / "parts.jsonl"
    write_answers(str(model), prompts, complete, SETTINGS, batch_size=2)
    write_answers(str(model), prompts, parts, SETTINGS, batch_size=2, limit=7)
    with parts.open("a") as file:
        file.write('{"row": 99, "prompt": "a write that was interru')
    write = own_answers.files.write
    calls = []

    def fails_once(*words):
        calls.append(words)
        if len(calls) == 2:
            raise OSError("disk full")
        write(*words)

    monkeypatch.setattr(own_answers.files, "write", fails_once)
    with pytest.raises(OSError, match="disk full"):
        write_answers(str(model), prompts, parts, SETTINGS, batch_size=2)
    write_answers(str(model), prompts, parts, SETTINGS, batch_size=2)
    assert read(parts) == read(complete)


def test_answers_that_do_not_tokenise_back_are_left_out(tiny_model, tmp_path):
    """A random model of bytes writes some that are no UTF-8."""
    prompts = prompts_file(tmp_path)
    counts = write_answers(str(tiny_model), prompts, tmp_path / "out.jsonl", AnswerSettings(max_new_tokens=2))
    tokenizer = fluid_model.load(str(tiny_model)).tokenizer
    rows = read(tmp_path / "out.jsonl")
    assert (counts.rows, counts.rows + counts.left_out) == (len(rows), 30)
    assert counts.left_out > 0
    assert all("\ufffd" not in row["completion"] and tokenizer(row["completion"])["input_ids"] for row in rows)


@pytest.mark.parametrize("change", ["settings", "prompts", "model", "foreign"])
def test_other_answers_are_never_mixed_in(model, tmp_path, change):
    prompts, out, settings, path = prompts_file(tmp_path), tmp_path / "out.jsonl", SETTINGS, model
    if change == "foreign":
        out.write_text("mine\n")
    else:
        write_answers(str(model), prompts, out, settings, limit=4)
    before = out.read_bytes()
    if change == "settings":
        settings = AnswerSettings(max_new_tokens=13)
    elif change == "prompts":
        prompts = prompts_file(tmp_path, 31)
    elif change == "model":
        path = save_model(tmp_path / "other", seed=4)
    with pytest.raises(ConfigError, match="choose another file"):
        write_answers(str(path), prompts, out, settings)
    assert out.read_bytes() == before


def test_a_chat_is_rendered_by_the_template(model, tmp_path):
    checkpoint = fluid_model.load(str(model))
    checkpoint.tokenizer.chat_template = TEMPLATE
    fluid_model.save(checkpoint, tmp_path / "chat")
    prompts = prompts_file(tmp_path, 3)
    code = main(["write-answers", str(tmp_path / "chat"), str(prompts), str(tmp_path / "out.jsonl"), "--chat",
                 "--max-new-tokens", "12"])  # fmt: skip
    assert code == 0
    rows = read(tmp_path / "out.jsonl")
    assert rows
    for row in rows:
        prompt = tuple(checkpoint.tokenizer(f"Q: {row['row']}+1? A:\nA:", add_special_tokens=False)["input_ids"])
        (answer,) = fluid_model.engine_for(checkpoint, ArSettings()).generate([Request("0", prompt, 12)])
        assert row["messages"][-1] == {"role": "assistant", "content": answer.text}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat"], "no chat template; leave --chat out"),
        (["--limit", "0"], "--limit=0"),
        (["--max-new-tokens", "999999"], "prompt 1: .* leave no room for 999999 more"),
    ],
)
def test_bad_words_are_one_line(model, tmp_path, capsys, words, message):
    assert main(["write-answers", str(model), str(prompts_file(tmp_path)), str(tmp_path / "out.jsonl"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
