"""`fluid-eval trace` shows what the engine did, and docs/decoders.md shows its output."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

import fluid_model
from bench import traces
from fluid_eval.analysis.trace import runs, trace_answer
from fluid_eval.cli.main import main
from fluid_eval.common.paths import resource
from fluid_eval.common.spec import build_spec
from fluid_model.registry import decoders

PROMPT = (
    "Question: There are 17 plates on the table of Omar. He gives Wendy 6. How many plates does Omar have?\nAnswer:"
)
DECODERS = (
    {"name": "ar"},
    {"name": "fluid", "slot_budget": 64},
    {"name": "fluid", "candidates": 1},
    {"name": "fluid", "verify": False, "confidence": 0.5},
    {"name": "fluid", "rounds": "reference"},
    {"name": "nbdiff", "small_blocks": 4},
    {"name": "llada", "block_length": 8},
)


@pytest.mark.parametrize("decoder", DECODERS)
def test_lines_are_the_forwards_and_make_up_the_answer(decoder):
    method = "fluid" if decoder["name"] == "ar" else decoder["name"]
    model = str(resource("checkpoints") / f"tiny-{method}")
    spec = build_spec({"tasks": "mini", "model": model, "decoder": decoder, "max_new_tokens": 24})
    records, answer = trace_answer(spec, PROMPT)
    count = {kind: sum(line.kind == kind for line in records) for kind in answer.trace.forwards}
    assert count == answer.trace.forwards
    assert sum(line.slots for line in records) == answer.trace.slots
    places = [place for line in records for place in line.committed]
    assert places == list(range(len(places)))
    assert (
        "".join(text for line in records for text in line.committed.values()).replace("⏎", "\n").startswith(answer.text)
    )
    drafted, siblings = dict[int, str](), 0
    assert any(line.siblings for line in records) == ("slot_budget" in decoder)
    for line in records:
        assert not set(line.drafted) & set(
            places[: sum(len(before.committed) for before in records[: records.index(line)])]
        )
        if decoder["name"] == "fluid" and line.kind != "prefill":
            last = max(line.committed, default=-1)
            others = [
                place for place, text in line.committed.items() if place != last and text != drafted.get(place, text)
            ]
            assert not others or siblings, "committed tokens were drafted, if not as the likeliest candidates"
        siblings = line.siblings
        drafted = line.drafted if line.committed else drafted | dict(line.drafted)


def test_slots_that_a_forward_leaves_out_are_not_drafted_again(tmp_path):
    """Small blocks are fed alone; the rest of their block is fed again later."""
    traces.lend("fast-dllm-v2", tmp_path / "m")
    decoder = {"name": "fast-dllm-v2", "small_block": 4, "confidence": 0.6, "block_cache": True}
    values = {"tasks": "mini", "model": str(tmp_path / "m"), "decoder": decoder, "max_new_tokens": 16}
    records, _ = trace_answer(build_spec(values), PROMPT)
    assert {line.slots for line in records if line.kind == "denoise"} == {4, 16}
    places = [place for line in records for place in line.drafted]
    assert len(places) == len(set(places))


def test_tokens_behind_a_committed_one_are_not_drafted_again(tmp_path):
    """A sliding window keeps them, and feeds them until they are committed."""
    traces.lend("wedlm", tmp_path / "m")
    decoder = {"name": "wedlm", "window": 8, "max_entropy": 1.0}
    values = {"tasks": "mini", "model": str(tmp_path / "m"), "decoder": decoder, "max_new_tokens": 16}
    records, _ = trace_answer(build_spec(values), PROMPT)
    assert sum(bool(line.committed) for line in records) > 2
    places = [place for line in records for place in line.drafted]
    assert len(places) == len(set(places))


def test_watching_changes_nothing():
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"))
    ids = tuple(checkpoint.tokenizer(PROMPT)["input_ids"])
    work = [fluid_model.Request(str(i), ids[: len(ids) - i], 16) for i in range(3)]
    engine, seen = fluid_model.engine_for(checkpoint, fluid_model.FluidSettings(slot_budget=64), 2), []
    expected = {g.key: g.ids for g in engine.generate(work)}
    engine.watch = seen.append
    assert {g.key: g.ids for g in engine.generate(work)} == expected
    assert {step.key for step in seen} == {"0", "1", "2"}
    assert all(len(step.ids) == len(step.positions) == len(step.anchors) for step in seen)


def test_runs():
    assert runs({}) == []
    assert runs({4: "a", 3: "b", 7: "c"}) == [("3-4", "ba"), ("7", "c")]


def test_colours_fit_the_terminal(capsys):
    assert main(["trace", "--prompt", PROMPT, "--max-new-tokens", "12"]) == 0
    out = capsys.readouterr().out
    assert "prefill" in out
    assert "12 tokens in" in out
    assert "slot_budget=64" in out, "so that there are drafts to look at"
    assert "[] committed by this forward   <> drafted" in out
    assert re.search(r"round +\d+ .*\[[^\]]+\]<[^>]+>", out), "without colours, in brackets"
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_conversation_is_traced_as_a_run_asks_it(tmp_path):
    """With the template's prompt, system turn included, and no special tokens but its own."""
    folder = tmp_path / "chatty"
    shutil.copytree(resource("checkpoints") / "tiny-fluid", folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    values = {"tasks": "mini", "model": str(folder), "max_new_tokens": 24}
    values |= {"decoder": {"name": "fluid", "slot_budget": 64}}
    plain, _ = trace_answer(build_spec(values), f"system: Omar\nuser: {PROMPT}\n")
    tokenizer = fluid_model.load_tokenizer(str(folder))
    begins = TemplateProcessing("#### $A", special_tokens=[("####", tokenizer.convert_tokens_to_ids("####"))])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(folder)
    assert len(fluid_model.load_tokenizer(str(folder)).encode("")) == 1
    chat = build_spec({**values, "chat": {"system": "Omar"}})
    assert trace_answer(chat, PROMPT)[0] == plain
    assert trace_answer(build_spec(values), f"system: Omar\nuser: {PROMPT}\n")[0] != plain


def test_bad_input_is_one_line(capsys):
    assert main(["trace", "--prompt", "x", "--set", "decoder.slot_budget=0"]) == 2
    assert capsys.readouterr().err == "fluid-eval: slot_budget=0 must lie in [1, 1000000]\n"
    llada = str(resource("checkpoints") / "tiny-llada")
    assert main(["trace", "--prompt", "x", "--decoder", "ar", "--model", llada]) == 2
    assert "reads in both directions; use --decoder llada" in capsys.readouterr().err
    assert main(["trace", "--prompt", "x", "--set", 'model.end_tokens=["no such"]']) == 2
    assert "end token 'no such' is not one token" in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(resource("docs").parent)
    page = (resource("docs") / "decoders.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (fluid-eval trace .*?) -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert set(decoders()) == {re.search(r"--decoder (\S+)", command)[1] for command, _ in tables}
    for method in traces.BORROWERS:
        traces.lend(method, Path("build") / "traces" / method)
    for command, table in tables:
        assert main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out.strip() == table.strip()
