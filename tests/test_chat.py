"""Conversations: prompts are lm-eval's own, token for token; thinking is told from answers; what cannot be is said."""

from __future__ import annotations

import json
import shutil

import pytest

import fluid_eval
from fluid_eval.benchmarks.chat_template import Chat, open_chat
from fluid_eval.cli import EXIT_UNHEALTHY
from fluid_eval.cli.main import main
from fluid_eval.common.spec import ChatSpec, build_spec
from fluid_eval.output.report import write_report
from fluid_eval.results import run_folder
from fluid_eval.running.job import run
from fluid_eval.sandbox.passing import build_predictions_instruct
from fluid_model import ConfigError, load_tokenizer

from .test_parity import theirs
from .tiny import MASK, byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if not enable_thinking %}At once: {% endif %}{% endif %}"
)
PICKY = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x{% endfor %}"
)


def with_template(folder, target, template=TEMPLATE):
    """A copy of a model folder whose tokenizer has a chat template."""
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(template)
    return target


@pytest.fixture(scope="module")
def chatty(stories, tmp_path_factory):
    return with_template(stories, tmp_path_factory.mktemp("chat") / "stories")


@pytest.fixture(scope="module")
def hf(chatty):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(chatty), device="cpu", dtype="float32", batch_size=1, enable_thinking=False)


@pytest.mark.slow
@pytest.mark.parametrize("multiturn", [True, False])
def test_prompts_and_answers_are_those_of_lm_evals_backend(hf, chatty, few_rows, tmp_path, multiturn):
    """GSM8K with two shots, HumanEval with a prefilled code fence, MMLU by likelihood; a system turn in each."""
    from fluid_eval.running.lm_eval_model import FluidLM

    tasks = ["gsm8k", "humaneval_instruct", "mmlu_anatomy"]
    system = "You answer briefly."
    expected = theirs(
        hf, tasks, few_rows, 2, 16, 2, apply_chat_template=True, fewshot_as_multiturn=multiturn,
        system_instruction=system,
    )  # fmt: skip
    values = {"tasks": tasks, "model": str(chatty), "data_dir": str(few_rows), "limit": 2, "max_new_tokens": 16}
    values |= {"num_fewshot": 2, "allow_unsafe_code": True, "chat": {"system": system, "multiturn": multiturn}}
    spec = build_spec(values)
    result = run(spec, tmp_path / "r")
    chat = open_chat(spec.chat, load_tokenizer(str(chatty)), "m")
    lm = FluidLM(chat.tokenizer, 512, None, run_folder.Run(tmp_path / "none", spec), None, chat)
    records = {record["key"]: record for record in run_folder.read_samples(tmp_path / "r")}
    assert len(records) == 6
    for task in tasks:
        for example in expected["samples"][task]:
            record = records[f"{task}/{example['doc_id']}"]
            prompt = example["arguments"][0][0]
            assert record["prompt"] == prompt
            if task != "mmlu_anatomy":
                ids, _ = hf.tok_batch_encode([prompt])
                assert lm._encode_all([prompt])[prompt] == tuple(ids[0].tolist())
                assert record["output"] == example["resps"][0][0]
            else:
                pairs = [args[:2] for args in example["arguments"]]
                split = lm._encode_pairs(pairs)
                assert [tuple(map(list, split[pair])) for pair in pairs] == [hf._encode_pair(*pair) for pair in pairs]
                assert record["loglikelihoods"] == pytest.approx([v for ((v, _),) in example["resps"]], abs=1e-4)
    for line in result["lines"]:
        assert line["score"] == expected["results"][line["task"]][f"{line['metric']},{line['filter']}"]
    shots = records["gsm8k/0"]["prompt"].count("<|assistant|>") - 1
    assert shots == (2 if multiturn else 0)
    assert records["humaneval_instruct/0"]["prompt"].rstrip().endswith('"""'), "the answer's beginning stays open"
    assert result["chat"]["template"] == open_chat(spec.chat, load_tokenizer(str(chatty)), "m").describe()["template"]


def chat_of(tokenizer=None, template=TEMPLATE, **settings) -> Chat:
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.chat_template = template
    chat = open_chat(ChatSpec(**settings), tokenizer, "m")
    assert chat is not None
    return chat


TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
]


def test_settings_reach_the_template():
    end = "</s>\n<|assistant|>\n"
    assert chat_of().render(TURNS).endswith(f"2+2?{end}At once: ")
    assert chat_of(thinking=True, end_of_thinking="%").render(TURNS).endswith(f"2+2?{end}")
    suffixed = chat_of(suffix=" /no_think").render(TURNS)
    assert suffixed.endswith(f"2+2? /no_think{end}At once: ")
    assert suffixed.count("/no_think") == 1
    moody = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat_of(template=moody, variables={"mood": "merry"}).render(TURNS) == "merry1+1?22+2?"
    assert TURNS[2]["content"] == "2+2?", "lm-eval's turns are left alone"


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        ("{{ bos_token }}", "turn 1 of 3"),
        ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "turn 1 of 3"),
        ("{{ messages[-1].content }}", r"turn 1 of 3 .* --set chat\.multiturn=false"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", r"turn 2 of 3 \(assistant\)"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "turn 3 of 3"),
        ("{% for m in messages %}{{ m.content[3] }}{% endfor %}{{ messages[9].content }}", "refuses a conversation"),
        ("{{ 1 // 0 }}", "refuses a conversation"),
    ],
)
def test_a_prompt_without_its_turns_is_refused(template, turn):
    """By marked texts of the same roles, so that a short one is not taken for another's letters."""
    long = [*TURNS[:2], {"role": "user", "content": "What is the sum of two and two?"}]
    with pytest.raises(ConfigError, match=turn):
        chat_of(template=template).render(long)


def test_a_system_prompt_that_is_dropped_is_refused():
    quiet = "{% for m in messages if m.role != 'system' %}{{ m.content | trim }}{% endfor %}"
    chat = chat_of(template=quiet, system="Be brief.")
    assert chat.render(TURNS) == "1+1?22+2?"
    with pytest.raises(ConfigError, match=r"leaves out turn 1 of 4 \(system\)"):
        chat.render([*chat.system_turn, *TURNS])
    written = chat_of(template="{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    assert 'a \\"b\\"' in written.render([{"role": "user", "content": 'a "b"'}]), "escaped is not left out"


def test_one_bos_whoever_writes_it(tmp_path):
    """The tokenizer adds its own to plain prompts; a template's is not doubled; a template's two are refused."""
    from tokenizers import processors

    from fluid_eval.running.lm_eval_model import FluidLM

    def encode(text, template):
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        spec = build_spec({"tasks": ["gsm8k"], "model": "m"})
        chat = chat_of(tokenizer, template) if template else None
        lm = FluidLM(tokenizer, 99, None, run_folder.Run(tmp_path / "r", spec), None, chat)
        return lm._encode_all([text])[text].count(0)

    assert encode("plain", None) == 1
    assert encode("<s>its own", None) == 1
    assert encode("<s><|user|>", TEMPLATE) == 1
    assert encode("<|user|>", PICKY) == 0, "the template decides, as in transformers"
    with pytest.raises(ConfigError, match="starts with <s> twice, as written by the model's chat template"):
        encode("<s><s><|user|>", TEMPLATE)


def test_known_ends_of_thinking_are_found():
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match=r"no token known to end thinking .* --set chat\.end_of_thinking=TEXT"):
        chat_of(tokenizer, thinking=True)
    assert chat_of(tokenizer, thinking=True, end_of_thinking="%").end_of_thinking == "%"
    tokenizer.add_special_tokens({"additional_special_tokens": ["[unused17]"]})
    assert chat_of(tokenizer, thinking=True).describe()["end_of_thinking"] == "[unused17]"
    assert chat_of(tokenizer, thinking=True, end_of_thinking="%").end_of_thinking == "%"
    assert chat_of(tokenizer).describe()["end_of_thinking"] is None


def test_a_model_that_thinks_unasked_is_noticed():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[unused17]"]})
    texts = ["so[unused17]4", "4", "[unused17]"]
    records = [{"task": "t", "finish": "eos", "output_ids": tokenizer.encode(text)} for text in texts]
    (notice,) = chat_of(tokenizer).notices([*records, {"task": "u", "finish": None}])
    assert notice.startswith("t: 2 of 3 answers hold [unused17]: the model thinks all the same")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["ar", "fluid", "nbdiff", "llada"])
def test_thinking_through_the_main_job(tiny_fluid, tmp_path, capsys, decoder):
    """Only what follows the last end of thinking counts, and every decoder's answers are cut alike."""
    model = with_template(tiny_fluid, tmp_path / "m", "{% for m in messages %}{{ m.content }}{% endfor %}")
    if decoder in ("nbdiff", "llada"):
        manifest = json.loads((model / "fluid.json").read_text())
        (model / "fluid.json").write_text(json.dumps({**manifest, "method": decoder, "k_max": None, "tau": []}))

    def go(name, end):
        words = ["--tasks", "mini_gsm8k_1", "--model", model, "--decoder", decoder, "--limit", 6, "--chat"]
        words += ["--max-new-tokens", 24, "--out", tmp_path / name]
        words += ["--set", "chat.thinking=true", "--set", f"chat.end_of_thinking={json.dumps(end)}"]
        assert main(["run", *map(str, words)]) == EXIT_UNHEALTHY, "every answer hits the limit"
        return fluid_eval.load_results(tmp_path / name), capsys.readouterr().out

    never, out = go("never", "never written")
    assert never["output"].tolist() == [""] * 6
    assert not never["thinking_ended"].any()
    assert "6 of 6 answers never ended their thinking" in " ".join(out.split())
    assert "! thinking never ended mini_gsm8k_1 6/6 100.0%" in " ".join(out.split())
    assert "chat (multiturn=True, thinking=True, end_of_thinking=never written, template=" in " ".join(out.split())
    letters = map(chr, range(33, 127))
    end = next(letter for letter in letters if 0 < sum(letter in text for text in never["raw_output"]) < 6)
    frame, _ = go("some", end)
    assert frame["output_ids"].tolist() == never["output_ids"].tolist()
    assert frame["raw_output"].tolist() == never["raw_output"].tolist()
    for record in frame.itertuples():
        assert record.thinking_ended == (end in record.raw_output)
        after = record.raw_output.rpartition(end)[2].replace("<s>", "").replace(MASK, "").lstrip()
        assert record.output == (after if record.thinking_ended else "")
    line = run_folder.read_json(tmp_path / "some" / "result.json")["lines"][0]
    assert 0 < line["unended_thinking"] == (~frame["thinking_ended"]).sum() < 6
    write_report([tmp_path / "some"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"{line['unended_thinking']} of 6 answers never ended their thinking" in page
    assert "Prompts as a <b>chat</b> (multiturn yes, thinking yes" in page
    assert page.count('"thinking":"never ended"') == line["unended_thinking"]


BAD = {
    "no template": ([], None, "has no chat template; leave --chat out"),
    "setting alone turns it on": (["--set", "chat.system=x"], None, "has no chat template; leave --chat out"),
    "unknown end": (["--set", "chat.thinking=true"], TEMPLATE, "has no token known to end thinking (</think>, "),
    "system refused": (
        ["--set", "chat.system=x"],
        PICKY,
        "the model's template refuses a conversation of system, user turns: no system here",
    ),
    "thinking where nothing is written": (
        ["--tasks", "mini_mmlu", "--set", "chat.thinking=true", "--set", "chat.end_of_thinking=%"],
        TEMPLATE,
        "task mini_mmlu_1 writes nothing, it compares likelihoods",
    ),
    "thinking where the answer has begun": (
        ["--tasks", "humaneval_instruct", "--set", "chat.thinking=true", "--set", "chat.end_of_thinking=%"],
        TEMPLATE,
        "task humaneval_instruct begins the answer itself",
    ),
    "unknown setting": (["--set", "chat.sistem=x"], TEMPLATE, "chat.sistem is no setting; did you mean chat.system?"),
    "variable of the run's": (["--set", "chat.variables.enable_thinking=true"], TEMPLATE, "from chat.thinking"),
    "date": (["--set", "chat.variables.today=2025-01-01"], TEMPLATE, "is a date; quote it"),
    "two BOS": ([], "{{ bos_token }}" + TEMPLATE, "starts with <s> twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_before_any_weights_load(capsys, tmp_path, tiny_model, case):
    words, template, message = BAD[case]
    model = with_template(tiny_model, tmp_path / "m", template or "")
    if template is None:
        (model / "chat_template.jinja").unlink()
    (model / "model.safetensors").write_bytes(b"no weights")
    words = [
        *words,
        *(["--chat"] if "alone" not in case else []),
        "--model",
        model,
        "--limit",
        2,
        "--allow-unsafe-code",
    ]
    words += [] if "--tasks" in words else ["--tasks", "mini_gsm8k_1"]
    code = main(["run", "--max-new-tokens", "8", *map(str, words), "--out", str(tmp_path / "r")])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "r").exists()


def test_every_setting_of_a_chat_names_another_run():
    base = {"tasks": ["gsm8k"], "model": "m"}
    chats = [
        None, {}, {"system": "x"}, {"multiturn": False}, {"thinking": True}, {"end_of_thinking": "%"}, {"suffix": "x"},
        {"variables": {"a": 1}},
    ]  # fmt: skip
    specs = [build_spec({**base, "chat": chat}) for chat in chats]
    assert len({spec.id for spec in specs}) == len(chats)
    assert specs[0].id == build_spec(base).id == build_spec({**base, "chat": False}).id
    assert specs[1] == build_spec({**base, "chat": True})
    assert "chat" not in specs[0].identity(), "runs without one keep their names"


def test_an_instructed_function_ends_with_its_fence():
    docs = [{"prompt": "def one():\n"}]
    bodies = [["    return 1\n```\nIt returns 1, as ```python``` would.", "    return 1\n"]]
    assert build_predictions_instruct(bodies, docs) == [["def one():\n    return 1\n"] * 2]


def test_a_template_is_picked_by_name(tmp_path, tiny_model):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    file = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": TEMPLATE}, {"name": "rag", "template": "{{ messages[0].content }}"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    tokenizer = load_tokenizer(str(folder))
    for settings in (ChatSpec(), ChatSpec(template="default")):
        with pytest.raises(ConfigError, match=r"chat\.template=\w+: m has chat templates by name: rag, tool_use; "):
            open_chat(settings, tokenizer, "m")
    asked = [{"role": "user", "content": "hi"}]
    assert open_chat(ChatSpec(template="rag"), tokenizer, "m").render(asked) == "hi"
    assert "<|user|>" in open_chat(ChatSpec(template="tool_use"), tokenizer, "m").render(asked)
    with pytest.raises(ConfigError, match="has no chat templates by name"):
        open_chat(ChatSpec(template="rag"), byte_tokenizer(), "m")
