"""Training data as users hold them: forms, registers, bad rows, chat templates, packs."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_model import ConfigError
from fluid_model.train.data import TrainingSet, encode, pack_examples
from fluid_model.train.recipe import DataSpec
from fluid_model.train.row_layouts import Example, causal_row
from fluid_model.train.rows import ChatTurn, Columns, DataRow, DataSource, data_sources, load_rows, read_rows

from .tiny import byte_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*texts):
    """The user's and the assistant's turns in turn."""
    roles = ("user", "assistant") * len(texts)
    return DataRow(chat=tuple(map(ChatTurn, roles, texts)))


ALPACA = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.", "history": [["Hi", "Hello"]]}
ALPACA_ROW = DataRow(
    chat=(
        ChatTurn("system", "Be brief."),
        ChatTurn("user", "Hi"),
        ChatTurn("assistant", "Hello"),
        ChatTurn("user", "Add.\n1+1"),
        ChatTurn("assistant", "2"),
    )
)
SHAREGPT = {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}
MESSAGES = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
CHAT_ROW = chat("1+1?", "2")


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
        ({"prompt": "Q", "completion": " A"}, DataRow("Q", " A")),
        ({"prompt": "", "completion": "A"}, DataRow("", "A")),
        ({"text": "Once"}, DataRow("", "Once")),
        (ALPACA, ALPACA_ROW),
        (
            {"instruction": "Say 2.", "output": "2"},
            chat("Say 2.", "2"),
        ),
        (SHAREGPT, CHAT_ROW),
        (MESSAGES, CHAT_ROW),
    ],
)
def test_forms_of_rows(tmp_path, name, value, row):
    assert list(read_rows(DataSource(written(tmp_path / name, [value, value])))) == [row, row]


def test_plain_text_is_one_row_a_paragraph(tmp_path):
    (tmp_path / "a.txt").write_text("One\ntwo.\n\n\n\nThree.\n")
    assert [row.completion for row in read_rows(DataSource(tmp_path / "a.txt"))] == ["One\ntwo.", "Three."]


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
        ("hub", "hub: hf_hub_url is not fetched here"),
        ("pairs", "ranked pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            data_sources(spec(name))


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
        list(read_rows(DataSource(file)))
    assert what in str(caught.value)


def test_missing_files_and_columns_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        load_rows(DataSpec(files=(str(tmp_path / "nowhere.jsonl"),)))
    file = written(tmp_path / "a.jsonl", [{"ask": "x", "say": "y"}])
    with pytest.raises(ConfigError, match="line 1: not a training row: missing 'completion'"):
        list(read_rows(DataSource(file)))
    assert next(read_rows(DataSource(file, Columns(prompt="ask", response="say")))).chat[0].text == "x"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "q", "output": "a", "text": "q a"}, "text and output: which is to be learnt?"),
        ({"prompt": "q", "completion": "a", "text": "q a"}, "completion and text: which"),
        ({**MESSAGES, **SHAREGPT}, "conversations and messages: which"),
        ({**MESSAGES, "tools": [{"name": "add"}]}, "tools: no stage here shows tools"),
        ({**SHAREGPT, "images": ["a.jpg"]}, "images: no stage here shows images"),
        ({"prompt": "q", "completion": "a", "label": False}, "label: no stage here trains on feedback"),
        ({**MESSAGES, "kto_tag": True}, "kto_tag: no stage here trains on feedback"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen: no stage here trains on feedback or ranked"),
        ({"prompt": "q", "completion": "a", "weight": 0.5}, "weight=0.5 must be 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": "0"}]}, "weight='0' must be 0 or 1"),
        ({"messages": [{"role": "user", "content": "q", "weight": 1}]}, "role 'user' is weighed 1"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "role 'tool': no stage here writes it"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls: no stage here"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "role 'function_call': no stage here"),
        ({"conversations": [{"from": "observation", "value": "3"}]}, "role 'observation': no stage here"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]}, "reasoning_content: no"),
        ({"messages": "q"}, "messages must be a list of turns"),
        ({"instruction": "q", "output": "a", "history": [["x", None]]}, "history must be a list of pairs of texts"),
        ({"instruction": ["q"], "output": "a"}, "instruction must be text"),
        ({"instruction": "q", "output": "a", "system": 3}, "system must be text"),
    ],
)
def test_a_row_that_cannot_be_honoured_is_refused(tmp_path, row, what):
    with pytest.raises(ConfigError) as caught:
        list(read_rows(DataSource(written(tmp_path / "a.jsonl", [row]))))
    assert f"a.jsonl, line 1: not a training row: {what}" in str(caught.value)


def test_empty_fields_say_nothing(tmp_path):
    bare = {"text": None, "tools": [], "images": None, "tool_calls": None, "weight": None}
    rows = [{**MESSAGES, **bare}, {**MESSAGES, "prompt": "its first question"}]
    assert list(read_rows(DataSource(written(tmp_path / "a.jsonl", rows)))) == [CHAT_ROW, CHAT_ROW]


def test_a_system_message_stands_for_the_system_field(tmp_path):
    row = {"system": "field", "conversations": [{"from": "system", "value": "turn"}, *SHAREGPT["conversations"]]}
    (read,) = read_rows(DataSource(written(tmp_path / "a.jsonl", [row])))
    assert [turn.text for turn in read.chat] == ["turn", "1+1?", "2"]


@pytest.mark.parametrize("silent", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}, {"training": False}])
def test_what_weighs_nothing_carries_no_loss(tmp_path, silent):
    tokenizer = byte_tokenizer()
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **silent},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1},
    ]  # fmt: skip
    rows = [{"messages": turns}, {"messages": turns[:2]}, {"prompt": "x", "completion": "y", "weight": 0}]
    (row,) = read_rows(DataSource(written(tmp_path / "a.jsonl", rows)))
    end = tokenizer.eos_token
    for loss_on, learnt in (("responses", ["d" + end]), ("last", ["d" + end]), ("all", ["a\n", "\nc\nd" + end])):
        (example,) = encode(tokenizer, [row], 64, loss_on)
        assert [text.replace(tokenizer.bos_token or "", "") for text in learnt_texts(tokenizer, example)] == learnt
        assert "b" in tokenizer.decode(example.ids), "it is read all the same"
    assert (
        encode(tokenizer, [DataRow(chat=(ChatTurn("user", "a"), ChatTurn("assistant", "b", False)))], 64, "last") == []
    )


def test_what_of_a_row_is_learnt():
    tokenizer = byte_tokenizer()
    rows = [
        DataRow(
            chat=(ChatTurn("user", "a"), ChatTurn("assistant", "b"), ChatTurn("user", "c"), ChatTurn("assistant", "d"))
        )
    ]
    assert [len(encode(tokenizer, rows, 64, loss_on)[0].spans) for loss_on in ("responses", "last", "all")] == [2, 1, 1]
    (everything,) = encode(tokenizer, [DataRow("12", "34")], 64, "all")
    assert everything.spans == ((0, len(everything.ids)),)


def test_json_is_told_by_its_text_not_its_name(tmp_path):
    """As by the `datasets` library: an array or lines, in .json and .jsonl alike."""
    row = {"prompt": "Q", "completion": "A"}
    for name in ("lines.json", "lines.json.gz", "array.jsonl"):
        text = json.dumps([row, row], indent=1) if "array" in name else json.dumps(row) + "\n" + json.dumps(row)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        assert list(read_rows(DataSource(tmp_path / name))) == [DataRow("Q", "A")] * 2
    (tmp_path / "empty.json").write_text("\n")
    assert list(read_rows(DataSource(tmp_path / "empty.json"))) == []


def registered(folder, entry, rows, **more):
    written(folder / "set.json", rows)
    (folder / "dataset_info.json").write_text(json.dumps({"set": {"file_name": "set.json", **entry}}))
    spec = DataSpec(dataset_info=str(folder / "dataset_info.json"), datasets=("set",), **more)
    return [row for source in data_sources(spec) for row in read_rows(source)]


def test_a_register_says_which_columns_are_read(tmp_path):
    """What it does not name is not read, as in LLaMA-Factory."""
    both = {"instruction": "1+1?", "output": "2", "text": "rendered", "system": "s", "ask": "3?"}
    assert registered(tmp_path, {}, [both]) == [CHAT_ROW]
    assert registered(tmp_path, {"columns": {"prompt": "text"}}, [both]) == [DataRow("", "rendered")]
    mapped = {"columns": {"prompt": "ask", "response": "output", "system": "system"}, "split": "train"}
    (row,) = registered(tmp_path, mapped, [both])
    assert [turn.text for turn in row.chat] == ["s", "3?", "2"]
    chat = {"formatting": "openai", "columns": {"messages": "messages"}}
    assert registered(tmp_path, chat, [{**MESSAGES, "text": "rendered"}]) == [CHAT_ROW]


def test_num_samples_and_max_rows_cap_a_set(tmp_path):
    rows = [{"instruction": f"{n}?", "output": str(n)} for n in range(20)]
    drawn = registered(tmp_path, {"num_samples": 5}, rows)
    texts = [row.chat[1].text for row in drawn]
    assert drawn == registered(tmp_path, {"num_samples": 5}, rows), "the same ones every time"
    assert len(set(texts)) == 5
    assert texts != [str(n) for n in range(5)], "drawn, not the first ones"
    with pytest.raises(ConfigError, match="num_samples=21, and it holds 20 rows"):
        registered(tmp_path, {"num_samples": 21}, rows)
    files = (str(written(tmp_path / "a.jsonl", rows)), str(written(tmp_path / "b.jsonl", rows)))
    train, held = load_rows(DataSpec(files=files, max_rows=3, held_out=0.25))
    assert [row.chat[1].text for row in (*train, *held)] == ["0", "1", "2"] * 2
    assert len(held) == 2, "a share is rounded up"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"split": "validation"}, "split='validation': a file has no split but train"),
        ({"subset": "x"}, "subset='x': a file has none"),
        ({"folder": "x"}, "folder='x': a file has none"),
        (
            {"columns": {"promt": "q"}},
            "columns.promt is no setting; did you mean columns.prompt?",
        ),
        ({"colums": {"prompt": "q"}}, "colums is no setting; did you mean columns? known: file_name, formatting"),
        ({"columns": {"response": "a"}}, "columns.prompt is missing"),
        ({"columns": {"prompt": "q", "system": "s"}}, "columns.system needs columns.response"),
        ({"columns": {"prompt": 3}}, "columns.prompt=3 must be text"),
        ({"columns": {"messages": "m", "kto_tag": "label"}, "formatting": "sharegpt"}, "columns.kto_tag: no stage"),
        ({"formatting": "sharegpt", "columns": {"prompt": "q"}}, "columns.messages is missing"),
        (
            {"formatting": "sharegpt", "tags": {"roll_tag": "x"}},
            "tags.roll_tag is no setting; did you mean tags.role",
        ),
        ({"formatting": "csv"}, "formatting='csv' is unknown; known: alpaca, sharegpt, openai"),
        ({"ranking": True}, "ranked pairs"),
        ({"ranking": "no"}, "ranking='no' must be true or false"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_samples": "2"}, "num_samples='2' must be"),
        ({"ms_hub_url": "a/b"}, "ms_hub_url is not fetched here"),
        ({"script_url": "a"}, "script_url is not fetched here"),
        ({"file_sha1": "0" * 40}, "file_sha1=0000000000000000000000000000000000000000 is not that of"),
    ],
)
def test_an_entry_that_cannot_be_honoured_is_refused(tmp_path, entry, message):
    with pytest.raises(ConfigError) as caught:
        registered(tmp_path, entry, [{"instruction": "q", "output": "a"}])
    assert "dataset_info.json: set: " in str(caught.value)
    assert message in str(caught.value)


def test_a_folder_of_files_is_one_set(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    spec = DataSpec(dataset_info=str(tmp_path / "dataset_info.json"), datasets=("set",), held_out=1)
    (tmp_path / "dataset_info.json").write_text('{"set": {"file_name": "parts"}}')
    with pytest.raises(ConfigError, match="parts: an empty folder"):
        data_sources(spec)
    for n in (1, 0):
        written(folder / f"{n}.json", [{"instruction": f"{n}?", "output": str(n)}])
    assert [row.chat[1].text for row in (*load_rows(spec)[0], *load_rows(spec)[1])] == ["0", "1"]
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"files of several kinds \(\.json, \.txt\)"):
        data_sources(spec)
    with pytest.raises(ConfigError, match="parts is a folder; name its files"):
        data_sources(DataSpec(files=(str(folder),)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"\.parquet is not read here"):
        data_sources(DataSpec(files=(str(tmp_path / "a.parquet"),)))


def learnt_texts(tokenizer, example):
    return [tokenizer.decode(example.ids[start:end]) for start, end in example.spans]


def test_prompts_carry_no_loss():
    tokenizer = byte_tokenizer()
    (plain_row,) = encode(tokenizer, [DataRow("1+1=", "2")], 64)
    assert learnt_texts(tokenizer, plain_row) == ["2" + tokenizer.eos_token]
    tokenizer.chat_template = CHAT
    (chat,) = encode(tokenizer, [ALPACA_ROW], 200)
    assert learnt_texts(tokenizer, chat) == ["Hello</assistant>", "2</assistant>"]
    everything = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in ALPACA_ROW.chat], tokenize=False
    )
    assert tokenizer.decode(chat.ids) == everything
    tokenizer.chat_template = None
    (bare,) = encode(tokenizer, [ALPACA_ROW], 200)
    assert learnt_texts(tokenizer, bare) == ["Hello" + tokenizer.eos_token, "2" + tokenizer.eos_token]


def test_cut_rows_keep_what_is_left_of_their_response():
    tokenizer = byte_tokenizer()
    rows = [DataRow("12345", "67"), DataRow("1", "2"), DataRow("", "123456789")]
    kept = encode(tokenizer, rows, 5)
    assert [(len(example.ids), example.spans) for example in kept] == [(3, ((1, 3),)), (5, ((0, 5),))]
    two_turns = DataRow(
        chat=(ChatTurn("user", "a"), ChatTurn("assistant", "b"), ChatTurn("user", "cdefgh"), ChatTurn("assistant", "i"))
    )
    (cut,) = encode(tokenizer, [two_turns], 8)
    assert len(cut.spans) == 1


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=200), room=st.integers(30, 90), seed=st.integers(0, 9))
def test_packs_hold_every_example_once_and_fit(sizes, room, seed):
    examples = [Example((n,) * size, ((0, size),)) for n, size in enumerate(sizes)]
    made = pack_examples(examples, room, seed)
    assert sorted(example.ids[0] for pack in made for example in pack) == list(range(len(sizes)))
    assert all(sum(len(example.ids) for example in pack) <= room for pack in made)
    assert made == pack_examples(examples, room, seed)
    half_full = sum(2 * sum(len(e.ids) for e in pack) <= room for pack in made)
    assert half_full <= 1, "two packs that fit together would have been one"


def test_draws_depend_on_their_number_alone():
    class Numbered:
        def build(self, example, rng, step):
            row = causal_row(example)
            row.ids[0] = rng.randint(0, 10**6) * 100 + step
            return row

    made = [(Example((n, n), ((1, 2),)),) for n in range(5)]
    rows = TrainingSet(made, Numbered(), steps=4, batch=3, seed=1)
    forward = [rows[i] for i in range(len(rows))]
    assert [rows[i] for i in reversed(range(len(rows)))] == forward[::-1]
    assert [row.ids[0] % 100 for row in forward] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], "a layout knows its step"
    assert {row.ids[1] for row in forward[:5]} == set(range(5)), "every example once before any twice"
