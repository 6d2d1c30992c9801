"""Training data as users hold them: forms, registers, bad rows, chat templates, packs."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_model import ConfigError
from fluid_model.layout import Example, plain
from fluid_model.train.data import Rows, encode, packs
from fluid_model.train.llamafactory import as_toml, convert, read_yaml
from fluid_model.train.recipe import DataSpec, build_chain
from fluid_model.train.rows import Columns, Row, Source, Turn, load_rows, read_rows, sources

from .tiny import byte_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALPACA = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.", "history": [["Hi", "Hello"]]}
ALPACA_ROW = Row(
    chat=(
        Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Add.\n1+1"),
        Turn("assistant", "2"),
    )
)  # fmt: skip
SHAREGPT = {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}
MESSAGES = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
CHAT_ROW = Row(chat=(Turn("user", "1+1?"), Turn("assistant", "2")))


def written(file, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize(
    ("value", "row"),
    [
        ({"prompt": "Q", "completion": " A"}, Row("Q", " A")),
        ({"prompt": "", "completion": "A"}, Row("", "A")),
        ({"text": "Once"}, Row("", "Once")),
        (ALPACA, ALPACA_ROW),
        ({"instruction": "Say 2.", "output": "2"}, Row(chat=(Turn("user", "Say 2."), Turn("assistant", "2")))),
        (SHAREGPT, CHAT_ROW),
        (MESSAGES, CHAT_ROW),
    ],
)
def test_forms_of_rows(tmp_path, name, value, row):
    assert list(read_rows(Source(written(tmp_path / name, [value, value])))) == [row, row]


def test_plain_text_is_one_row_a_paragraph(tmp_path):
    (tmp_path / "a.txt").write_text("One\ntwo.\n\n\n\nThree.\n")
    assert [row.completion for row in read_rows(Source(tmp_path / "a.txt"))] == ["One\ntwo.", "Three."]


def test_a_register_of_llama_factory(tmp_path):
    info = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "response": "say", "images": "pics"}},
        "talk": {
            "file_name": "talk.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"},
        },
        "hub": {"hf_hub_url": "somebody/something"},
        "pairs": {"file_name": "mine.json", "ranking": True},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    written(tmp_path / "mine.json", [{"ask": "1+1?", "say": "2"}])
    written(tmp_path / "talk.jsonl", [{"turns": [{"who": "me", "what": "1+1?"}, {"who": "it", "what": "2"}]}])

    def spec(*names):
        return DataSpec(dataset_info=str(tmp_path / "dataset_info.json"), datasets=names, held_out=1)

    assert load_rows(spec("mine", "talk")) == ([CHAT_ROW], [CHAT_ROW])
    for name, message in (
        ("other", "'other' is not in .*known: mine, talk, hub, pairs"),
        ("hub", "hub has no file_name"),
        ("pairs", "ranked pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources(spec(name))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops", "Expecting"),
        ('"text"', "must be an object"),
        ('{"prompt": "x"}', "missing 'completion'"),
        ('{"text": 3}', "text must be text and not empty"),
        ('{"conversations": [{"from": "elf", "value": "x"}]}', "role 'elf' is unknown; known: human"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, line, what):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 3: not a training row") as caught:
        list(read_rows(Source(file)))
    assert what in str(caught.value)


def test_missing_files_and_columns_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        load_rows(DataSpec(files=(str(tmp_path / "nowhere.jsonl"),)))
    file = written(tmp_path / "a.jsonl", [{"ask": "x", "say": "y"}])
    with pytest.raises(ConfigError, match="line 1: not a training row: missing 'prompt'"):
        list(read_rows(Source(file)))
    assert next(read_rows(Source(file, Columns(prompt="ask", response="say")))).chat[0].text == "x"


def said(tokenizer, example):
    return [tokenizer.decode(example.ids[start:end]) for start, end in example.spans]


def test_prompts_carry_no_loss():
    tokenizer = byte_tokenizer()
    (plain_row,) = encode(tokenizer, [Row("1+1=", "2")], 64)
    assert said(tokenizer, plain_row) == ["2" + tokenizer.eos_token]
    tokenizer.chat_template = CHAT
    (chat,) = encode(tokenizer, [ALPACA_ROW], 200)
    assert said(tokenizer, chat) == ["Hello</assistant>", "2</assistant>"]
    whole = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in ALPACA_ROW.chat], tokenize=False
    )
    assert tokenizer.decode(chat.ids) == whole
    tokenizer.chat_template = None
    (bare,) = encode(tokenizer, [ALPACA_ROW], 200)
    assert said(tokenizer, bare) == ["Hello" + tokenizer.eos_token, "2" + tokenizer.eos_token]


def test_cut_rows_keep_what_is_left_of_their_response():
    tokenizer = byte_tokenizer()
    rows = [Row("12345", "67"), Row("1", "2"), Row("", "123456789")]
    kept = encode(tokenizer, rows, 5)
    assert [(len(example.ids), example.spans) for example in kept] == [(3, ((1, 3),)), (5, ((0, 5),))]
    two_turns = Row(chat=(Turn("user", "a"), Turn("assistant", "b"), Turn("user", "cdefgh"), Turn("assistant", "i")))
    (cut,) = encode(tokenizer, [two_turns], 8)
    assert len(cut.spans) == 1


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=200), room=st.integers(30, 90), seed=st.integers(0, 9))
def test_packs_hold_every_example_once_and_fit(sizes, room, seed):
    examples = [Example((n,) * size, ((0, size),)) for n, size in enumerate(sizes)]
    made = packs(examples, room, seed)
    assert sorted(example.ids[0] for pack in made for example in pack) == list(range(len(sizes)))
    assert all(sum(len(example.ids) for example in pack) <= room for pack in made)
    assert made == packs(examples, room, seed)
    half_full = sum(2 * sum(len(e.ids) for e in pack) <= room for pack in made)
    assert half_full <= 1, "two packs that fit together would have been one"


def test_draws_depend_on_their_number_alone():
    class Numbered:
        def lay(self, example, rng, step):
            row = plain(example)
            row.ids[0] = rng.randint(0, 10**6) * 100 + step
            return row

    made = [(Example((n, n), ((1, 2),)),) for n in range(5)]
    rows = Rows(made, Numbered(), steps=4, batch=3, seed=1)
    forward = [rows[i] for i in range(len(rows))]
    assert [rows[i] for i in reversed(range(len(rows)))] == forward[::-1]
    assert [row.ids[0] % 100 for row in forward] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], "a layout knows its step"
    assert {row.ids[1] for row in forward[:5]} == set(range(5)), "every example once before any twice"


YAML = """
model_name_or_path: parents/pangu
stage: sft
finetuning_type: lora
lora_rank: 16
lora_alpha: 32
dataset: alpaca_en, mine
dataset_dir: data
cutoff_len: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2e-4
max_steps: 32000
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
output_dir: saves/fluid
k_masks: 16
template: default
"""


def test_a_llama_factory_file_becomes_a_recipe(tmp_path):
    import tomllib

    (tmp_path / "train.yaml").write_text(YAML)
    values, unused = convert(read_yaml(tmp_path / "train.yaml"), devices=8)
    assert unused == ["template: default"]
    (recipe,) = build_chain(tomllib.loads(as_toml(values, unused)))
    assert (recipe.stage, recipe.out, recipe.model.parent) == ("fluid-hybrid", "saves/fluid", "parents/pangu")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.fans.k_max, recipe.data.max_length) == (16, 32, 16, 1024)
    assert (recipe.optim.batch_size, recipe.optim.accumulate, recipe.optim.steps) == (64, 4, 32000)
    assert (recipe.optim.learning_rate, recipe.optim.warmup, recipe.optim.schedule) == (2e-4, 0.1, "cosine")
    assert (recipe.data.datasets, recipe.data.dataset_info) == (("alpaca_en", "mine"), "data/dataset_info.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage: dpo", "stage=dpo: only sft and pt"),
        ("finetuning_type: freeze", "finetuning_type=freeze: known are lora and full"),
        ("learning_rate: fast", "learning_rate='fast' must be a number"),
        ("lr_scheduler_type: polynomial", "optim.schedule='polynomial' is unknown"),
    ],
)
def test_what_cannot_be_carried_over_is_said(tmp_path, change, message):
    (tmp_path / "train.yaml").write_text(YAML + change + "\n")
    with pytest.raises(ConfigError) as caught:
        convert(read_yaml(tmp_path / "train.yaml"))
    assert message in str(caught.value)


def test_epochs_are_no_steps(tmp_path):
    (tmp_path / "train.yaml").write_text(YAML.replace("max_steps: 32000", "num_train_epochs: 3"))
    with pytest.raises(ConfigError, match=r"max_steps is missing \(num_train_epochs=3\)"):
        convert(read_yaml(tmp_path / "train.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not a training file"):
        read_yaml(tmp_path / "bad.yaml")
