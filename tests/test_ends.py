"""Where an answer ends: end of sequence, stop string, length; the same for every decoder."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fluid_model
from fluid_model import ArSettings, ConfigError, FluidSettings, Request, engine_for
from fluid_model.engine.answers import AnswerRules, _StopRule
from fluid_model.engine.rows import Rows
from fluid_model.engine.strategy import RowUpdate, Updates

from .tiny import fluid_checkpoint

CHECKPOINT = fluid_checkpoint()
PROMPT = tuple(b + 2 for b in b"Q: 1+1? A:")


def write(decoder, new_tokens=40, stops=(), end_ids=None, mark=None, tokenizer=CHECKPOINT.tokenizer):
    checkpoint = replace(CHECKPOINT, end_ids=end_ids or CHECKPOINT.end_ids, tokenizer=tokenizer)
    request = Request("x", PROMPT, new_tokens, stops, end_of_thinking=mark)
    (answer,) = engine_for(checkpoint, decoder).generate([request])
    return answer


FREE = write(ArSettings())
PIECES = [CHECKPOINT.tokenizer.decode(FREE.ids[n : n + size]) for size in (1, 2, 3) for n in range(30)]
PIECES = [piece for piece in PIECES if piece.isascii() and not piece.isspace()]
"""Parts of the free text that are whole characters."""
REFERENCE = FluidSettings(rounds="reference")
DECODERS = [ArSettings(), FluidSettings(slot_budget=64), REFERENCE, replace(REFERENCE, confidence=0.2, min_horizon=5)]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_length(decoder, length):
    answer = write(decoder, length)
    assert (answer.ids, answer.finish) == (FREE.ids[:length], "length")


@pytest.mark.parametrize("decoder", DECODERS)
def test_end_of_sequence_is_not_part_of_the_answer(decoder):
    end = FREE.ids[9]
    first = FREE.ids.index(end)
    answer = write(decoder, end_ids=(end,))
    assert (answer.ids, answer.finish) == (FREE.ids[:first], "eos")


def test_end_of_sequence_past_the_length_limit_does_not_count():
    end = FREE.ids[9]
    first = FREE.ids.index(end)
    assert write(ArSettings(), first, end_ids=(end,)).finish == "length"


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 30), size=st.integers(1, 4), decoder=st.sampled_from(DECODERS))
def test_a_stop_string_cuts_ids_and_text_at_the_same_place(start, size, decoder):
    """Whatever piece of the free text is the stop string, the answer is the shortest prefix that holds it."""
    stop = CHECKPOINT.tokenizer.decode(FREE.ids[start : start + size])
    assume(stop in FREE.text)  # else it is part of a character, which no text holds
    answer = write(decoder, stops=("never written", stop))
    needed = next(n for n in range(1, 41) if stop in CHECKPOINT.tokenizer.decode(FREE.ids[:n]))
    assert (answer.ids, answer.finish) == (FREE.ids[:needed], "stop")
    assert answer.text == CHECKPOINT.tokenizer.decode(FREE.ids[:needed]).split(stop)[0]


def _with_words(words, decoder, **more):
    rust = Rust(models.BPE({word: n for n, word in enumerate(words)}, [], **more))
    rust.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=rust)


WORDS = ["Q", ":", "on", "no", ":)", "."]
BYTES = [f"<0x{n:02X}>" for n in "\n\u00e9\u20ac".encode()]
TOKENIZERS = {
    # as Llama 2's: spaces at the front of words, the text's first one taken away, bytes of rare characters
    "words and bytes": _with_words(
        [*BYTES, "\u2581", *WORDS, *("\u2581" + word for word in WORDS)],
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        byte_fallback=True,
    ),
    # as GPT-2's: any bytes
    "bytes": _with_words(
        [*sorted(pre_tokenizers.ByteLevel.alphabet())[:120], "\u0120on", "\u010a"], decoders.ByteLevel()
    ),
    "characters": CHECKPOINT.tokenizer,
}


def _prefixes(tokenizer, ids):
    """Texts of the first 0, 1, ... of these tokens."""
    return [tokenizer.decode(ids[:n], skip_special_tokens=False) for n in range(len(ids) + 1)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_token_that_completes_a_stop_string_is_passed_over(name, data):
    """Whatever the tokens are, and whatever part of their text the stop string is."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    texts = _prefixes(tokenizer, ids)
    assume(texts[-1])
    start = data.draw(st.integers(0, len(texts[-1]) - 1))
    stop = texts[-1][start : start + data.draw(st.integers(1, 4))]
    rule = _StopRule(tokenizer, (stop,))
    first = next(n for n, text in enumerate(texts) if stop in text)
    assert rule.may_complete(ids[first - 1])
    assert rule.may_complete(*ids[max(0, first - 2) : first]), "with the token before it"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_other_answers_have_taught_changes_no_end(name, data):
    """Every answer is its shortest prefix that holds one of its stop strings, whatever came before it."""
    tokenizer = TOKENIZERS[name]
    few = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=2, max_size=3))
    several = st.lists(st.sampled_from(few), min_size=1, max_size=8)
    rules, stops = AnswerRules(tokenizer, ()), ("never written",)
    for ids in data.draw(st.lists(several, min_size=3, max_size=8)):
        texts = _prefixes(tokenizer, ids)
        if data.draw(st.booleans()):
            two = data.draw(st.lists(st.sampled_from(few), min_size=1, max_size=2))
            stops = "never written", *filter(None, [tokenizer.decode(two, skip_special_tokens=False)])
        rows, at = Rows(1), 0
        row = rows.add([Request("x", PROMPT, 100, stops)], 0)
        rules.prepare(rows.requests)
        while at < len(ids) and not rows.finish:
            step = ids[at : at + data.draw(st.integers(1, 3))]
            rules.commit(rows, row, Updates.of([RowUpdate(step, [0] * len(step), ())]), None, 0.0)
            at += len(step)
        needed = next((n for n, text in enumerate(texts) if any(stop in text for stop in stops)), None)
        assert (rows.latest(0, 0), rows.finish.get(0)) == (ids[:needed], None if needed is None else "stop")


def test_most_tokens_need_not_be_decoded_with_those_before_them():
    rule = _StopRule(CHECKPOINT.tokenizer, ("Question:", "\n\n"))
    plain = CHECKPOINT.tokenizer("any text", add_special_tokens=False)["input_ids"]
    assert not any(map(rule.may_complete, plain))
    three, *colon, newline = CHECKPOINT.tokenizer("3:\n", add_special_tokens=False)["input_ids"]
    assert rule.may_complete(*colon)
    assert rule.may_complete(newline)
    assert not rule.may_complete(three, *colon)
    assert not rule.may_complete(three, newline)


def test_an_engine_learns_the_stop_strings_of_later_requests():
    """Tokens that ended no answer before may end one now."""
    engine = engine_for(CHECKPOINT, ArSettings())
    stop = PIECES[-1]
    (before,) = engine.generate([Request("x", PROMPT, 40, ("never written",))])
    (after,) = engine.generate([Request("x", PROMPT, 40, (stop,))])
    assert before.ids == FREE.ids
    assert (after.ids, after.finish) == (write(ArSettings(), stops=(stop,)).ids, "stop")


@settings(max_examples=25, deadline=None)
@given(end=st.sampled_from(PIECES), stop=st.sampled_from(PIECES), decoder=st.sampled_from(DECODERS))
def test_stop_strings_count_only_after_the_thinking(end, stop, decoder):
    """Whatever pieces of the free text end the thinking and stop the answer."""
    decode = CHECKPOINT.tokenizer.decode
    texts = [decode(FREE.ids[:n]) for n in range(41)]
    needed = next((n for n in range(41) if end in texts[n] and stop in texts[n].rpartition(end)[2]), None)
    answer = write(decoder, stops=(stop,), mark=end)
    assert (answer.ids, answer.finish) == ((FREE.ids[:needed], "stop") if needed else (FREE.ids, "length"))
    assert answer.text == texts[needed or 40].rpartition(end)[2].lstrip().split(stop)[0]


@pytest.mark.parametrize("decoder", DECODERS)
def test_thinking_that_never_ends_is_no_answer(decoder):
    answer = write(decoder, stops=(CHECKPOINT.tokenizer.decode(FREE.ids[3:5]),), mark="never written")
    assert (answer.ids, answer.finish, answer.text) == (FREE.ids, "length", "")


def test_the_end_of_thinking_may_be_a_special_token():
    """Then it is in no answer's text, and still ends the thinking."""
    tokenizer = copy.deepcopy(CHECKPOINT.tokenizer)
    mark = next(piece[0] for piece in PIECES if piece[1:2] == " ")  # white space follows it
    place = max(n for n, token in enumerate(FREE.ids) if tokenizer.decode([token]) == mark)
    tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    assert len(tokenizer) == len(CHECKPOINT.tokenizer), "the token is an old one"
    for decoder in DECODERS:
        answer = write(decoder, mark=mark, tokenizer=tokenizer)
        assert answer.ids == FREE.ids
        assert answer.text == tokenizer.decode(FREE.ids[place + 1 :], skip_special_tokens=True).lstrip()


def test_prompts_that_do_not_fit_are_refused():
    engine = engine_for(CHECKPOINT, ArSettings())
    with pytest.raises(ConfigError, match="250 prompt \\+ 40 new tokens exceed the model's window of 256"):
        list(engine.generate([Request("x", PROMPT * 25, 40)]))
    with pytest.raises(ConfigError, match="no tokens"):
        list(engine.generate([Request("x", (), 40)]))
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        list(engine.generate([Request("x", PROMPT, 0)]))
    with pytest.raises(ConfigError, match="batch_size=0"):
        engine_for(CHECKPOINT, ArSettings(), batch_size=0)


def test_a_prompt_may_fill_the_window():
    """No canvas is wider than the positions that are left."""
    prompt = (PROMPT * 25)[:240]
    (expected,) = engine_for(CHECKPOINT, ArSettings()).generate([Request("x", prompt, 16)])
    assert len(expected.ids) == 16
    for decoder in (FluidSettings(slot_budget=64), FluidSettings(min_horizon=8, slot_budget=100_000)):
        (answer,) = engine_for(CHECKPOINT, decoder).generate([Request("x", prompt, 16)])
        assert answer.ids == expected.ids
        left = 16
        for predicted, accepted in zip(answer.trace.predicted, answer.trace.accepted, strict=True):
            assert predicted <= left
            left -= accepted


@pytest.mark.parametrize("decoder", [d for d in DECODERS if isinstance(d, FluidSettings)])
@pytest.mark.parametrize("end", ["length", "eos", "stop"])
def test_strides_make_up_the_answer(end, decoder):
    """Tokens past the answer's end were accepted by nobody."""
    free = write(decoder)
    last = {"length": {}, "eos": {"end_ids": {free.ids[21]}}, "stop": {"stops": (free.text[18:20],)}}[end]
    answer = write(decoder, **last)
    assert answer.finish == end
    first = 1 if decoder.rounds == "one" and decoder.verify else 0  # which the prompt's own forward wrote
    if decoder.rounds == "one" and not decoder.verify:
        assert sum(answer.trace.accepted) <= len(answer.ids)
    else:
        assert first + sum(answer.trace.accepted) == len(answer.ids)


def test_time_is_shared_out_and_waiting_callers_cost_nothing():
    import time

    engine = engine_for(CHECKPOINT, ArSettings(), batch_size=2)
    started, slept, answers = time.perf_counter(), 0.0, []
    for answer in engine.generate([Request(str(i), PROMPT, 5 + i) for i in range(4)]):
        answers.append(answer)
        time.sleep(0.05)
        slept += 0.05
    spent = sum(a.seconds for a in answers)
    assert 0 < spent <= time.perf_counter() - started - slept + 0.01


def test_an_answer_may_begin_inside_a_token(stories):
    """The end of thinking is a text: its last token may hold the answer's first letters or white space."""
    checkpoint = fluid_model.load(str(stories))
    engine = engine_for(checkpoint, ArSettings())
    prompt = tuple(checkpoint.tokenizer("Once upon a time")["input_ids"])
    (free,) = engine.generate([Request("x", prompt, 24)])
    for start in range(0, 40):
        mark = free.text[start : start + 3]
        (answer,) = engine.generate([Request("x", prompt, 24, end_of_thinking=mark)])
        assert answer.text == free.text.rpartition(mark)[2].lstrip()
