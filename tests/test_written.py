"""What a trace tells of every token: the forward that wrote it, what was thrown out before it, its text."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, LladaSettings, NbdiffSettings, WedlmSettings
from fluid_model.engine.records import Generation, RowForward
from fluid_model.tokens import Tokenizer, decode_pieces

from .conftest import SHARED
from .test_laws import CHECKPOINT, NEW, requests
from .tiny import byte_tokenizer

FLUID = FluidSettings(slot_budget=200)
REFERENCE = FluidSettings(rounds="reference", min_horizon=4, confidence=0.0)
CAUSAL = (
    ArSettings(),
    FLUID,
    replace(FLUID, verify=False, confidence=0.1),
    REFERENCE,
    replace(REFERENCE, verify=False, confidence=0.1),
)
CANVAS = (
    NbdiffSettings(block_length=8, small_blocks=2, confidence=0.1),
    LladaSettings(block_length=8, steps=15),
    LladaSettings(block_length=8, steps=15, guidance=1.0),
    WedlmSettings(window=8, max_entropy=4.5),
)


@cache
def written(decoder, slots: int = 4) -> tuple[dict[str, Generation], dict[str, list[RowForward]]]:
    """Answers, and what a watcher saw of each."""
    seen: list[RowForward] = []
    engine = fluid_model.engine_for(CHECKPOINT, decoder, slots)
    engine.watch = seen.append
    answers = {answer.key: answer for answer in engine.generate(requests())}
    return answers, {key: [step for step in seen if step.key == key] for key in answers}


@pytest.mark.parametrize("decoder", [*CAUSAL, *CANVAS])
def test_every_token_names_a_forward_that_was_made(decoder):
    for answer in written(decoder)[0].values():
        when = answer.trace.written
        assert len(when) == len(answer.ids)
        assert when
        assert min(when) >= 1
        assert max(when) <= sum(answer.trace.forwards.values())


@pytest.mark.parametrize("decoder", CAUSAL)
def test_causal_decoders_write_from_left_to_right_what_the_watcher_sees(decoder):
    answers, steps = written(decoder)
    for key, answer in answers.items():
        when = answer.trace.written
        assert when == sorted(when)
        late = not isinstance(decoder, ArSettings)  # a commit hands out what the forward before it has written
        expected = [
            number - (late and step.kind == "commit") for number, step in enumerate(steps[key], 1) for _ in step.tokens
        ]
        assert when == expected[: len(when)]
        if isinstance(decoder, ArSettings):
            assert when == list(range(1, len(when) + 1))
        else:
            count = Counter(when)
            grown = [count[number] for number in sorted(count)]
            opened = decoder.rounds == "one" and decoder.verify  # there the prompt's own forward is no round
            assert grown[opened:] == [n for n in answer.trace.accepted if n]


@pytest.mark.parametrize("decoder", CANVAS)
def test_a_slot_names_the_pass_after_which_the_canvas_holds_its_token(decoder):
    """Feeds show it: a token stands in every feed after the pass that wrote it, and a mask in those before."""
    answers, steps = written(decoder)
    for key, answer in answers.items():
        start, trace = len(requests()[int(key)].prompt), answer.trace
        assert not trace.rejected
        for place, (token, when) in enumerate(zip(answer.ids, trace.written, strict=True), start):
            for number, step in enumerate(steps[key], 1):
                if place in step.positions and step.ids[0] != CHECKPOINT.mask_id:  # nor LLaDA's pass without the prompt
                    fed = step.ids[step.positions.index(place)]
                    assert fed == (token if when < number else CHECKPOINT.mask_id)
    assert any(answer.trace.written != sorted(answer.trace.written) for answer in answers.values())


@pytest.mark.parametrize("decoder", [FLUID, REFERENCE])
def test_rejected_drafts_were_fed_and_another_token_was_written(decoder):
    answers, steps = written(decoder)
    count = 0
    for key, answer in answers.items():
        start = len(requests()[int(key)].prompt)
        for forward, place, drafts in answer.trace.rejected:
            step = steps[key][forward - 1]
            slots = [*zip(step.ids, step.positions, step.anchors, strict=True)][::-1]  # the likeliest drafts come first
            tokens = {at: i for i, at, hung in slots if hung is None}
            assert [tokens[start + place + i] for i in range(len(drafts))] == drafts
            if place < len(answer.ids):
                assert answer.ids[place] != drafts[0]
                assert answer.trace.written[place] == forward
            assert place + len(drafts) <= NEW
            count += 1
        checked = sum(min(n, NEW) for n in answer.trace.predicted)
        assert checked >= sum(len(drafts) for *_, drafts in answer.trace.rejected)
    assert count > 10


def test_nothing_is_thrown_out_behind_a_stop_string():
    """Where an answer is cut, drafts behind the cut stood in nobody's place; where the model ends it, they did."""
    plain, _ = written(FLUID)
    text = [replace(r, stops=(plain[r.key].text[3:5], plain[r.key].text[9:11])) for r in requests()]
    for slots in (1, 4):
        for answer in fluid_model.engine_for(CHECKPOINT, REFERENCE, slots).generate(text):
            assert len(answer.trace.written) == len(answer.ids)
            assert answer.finish == "stop"
            assert all(place < len(answer.ids) for _, place, _ in answer.trace.rejected)


def test_what_the_threshold_dropped_is_told():
    """A threshold nothing passes drops all of the stride but its first token; one all passes drops nothing."""
    answers, _ = written(replace(FLUID, verify=False, confidence=1.0, min_horizon=4))
    for answer in answers.values():
        assert answer.trace.accepted == [1] * len(answer.ids)
        for forward, place, drafts in answer.trace.rejected:
            assert place == forward
            assert 3 <= len(drafts) <= 7 or place + len(drafts) == NEW
    answers, _ = written(replace(FLUID, verify=False, confidence=0.0))
    assert not any(answer.trace.rejected for answer in answers.values())


@cache
def tokenizer(name: str) -> Tokenizer:
    if name == "bytes":
        return byte_tokenizer()
    folder = SHARED / "models" / name if name == "stories260K" else resource("checkpoints") / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in a folder named shared beside the checkout")
    return fluid_model.load_tokenizer(str(folder))


TOKENIZERS = pytest.mark.parametrize("name", ["bytes", "tiny-fluid", "stories260K"])


@TOKENIZERS
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=20), noise=st.lists(st.integers(0, 255), max_size=8), cut=st.integers(0, 40))
def test_pieces_and_drafts_make_up_the_text(name: str, text: str, noise: list[int], cut: int):
    """Also where a text is cut inside a character, and where bytes spell none."""
    chosen = tokenizer(name)
    ids = (*chosen(text, add_special_tokens=False)["input_ids"], *noise)
    cut = min(cut, len(ids))
    pieces, (draft,) = decode_pieces(chosen, ids, [(cut, ids[cut:])])
    decoded, head = chosen.decode(ids), chosen.decode(ids[:cut])
    assert len(pieces) == len(ids)
    assert "".join(pieces) == decoded
    if "\ufffd" not in head and decoded.startswith(head):  # or bytes of one character stand on both sides
        assert "".join(pieces[:cut]) == head
        assert head + draft == decoded


def test_pieces_of_a_tokenizer_that_mends_its_text():
    """One that takes spaces out again, far from where its tokens end."""
    chosen = byte_tokenizer()
    chosen.clean_up_tokenization_spaces = True
    chosen.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = tuple(chosen("Well , I do n't know .")["input_ids"])
    assert "".join(decode_pieces(chosen, ids)[0]) == chosen.decode(ids) == "Well, I don't know."
