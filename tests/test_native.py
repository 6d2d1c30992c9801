"""The compiled forward equals the explicit one; a row's numbers do not depend on the rows beside it."""

from __future__ import annotations

import copy
import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, Request
from fluid_model.forward import attention_masks
from fluid_model.forward import compiled as native
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.kv_cache import KVCache

from .test_graphs import answers_and_logits
from .test_llama import CONFIGS, SIZES, model_of

pytestmark = pytest.mark.skipif(native.library(4) is None, reason="no C compiler")
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 112, "head_dim": 48, "attention_bias": True, "mlp_bias": True}


def by_torch(backbone):
    """The same forward, not compiled."""
    return lambda ids, reading, cache: backbone._forward(ids, reading, cache)


def fed(forward, ids, lengths, fresh, columns, widths=None, threads=1):
    """Hidden states of prompts of these lengths, and of more slots behind each; the cache's slot 0 is another's."""
    cache, width = KVCache(len(lengths) + 1, columns), max(lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden = []
        for start, count in (([0] * len(lengths), width), (lengths, fresh)):
            some = torch.stack([row[n : n + count] for row, n in zip(ids, start, strict=True)])
            reading = cache.set_write_positions(1, start, count, ids.device)
            hidden.append(forward(some, replace(reading, widths=widths if count == fresh else None), cache))
        return hidden
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*CONFIGS, "wide"])
def test_it_says_what_the_written_out_forward_says(name):
    """Grouped heads, biases, tied embeddings, scaled positions; prompts of different length, more slots behind each."""
    backbone = Backbone(model_of(LlamaConfig(**WIDE) if name == "wide" else CONFIGS[name]))
    assert backbone.native is not None
    ids, lengths = torch.randint(0, 97, (3, 14)), [9, 4, 7]
    with torch.inference_mode():
        for hidden, expected in zip(
            fed(backbone.native, ids, lengths, 5, 20), fed(by_torch(backbone), ids, lengths, 5, 20), strict=True
        ):
            for row, n in enumerate(lengths):
                assert torch.allclose(hidden[row, :n], expected[row, :n], atol=1e-4, rtol=1e-4)
        hidden = torch.randn(11, backbone.native._tables.hidden)
        expected = backbone.model.get_output_embeddings()(hidden)
        assert torch.allclose(backbone.logits(hidden), expected, atol=1e-4, rtol=1e-4)


def test_rows_and_threads_change_nothing(monkeypatch):
    """To the last bit: a row alone, among others, padded, with room to spare, on threads of its own."""
    monkeypatch.setattr(native, "WORTH", 1e5)
    backbone = Backbone(model_of(LlamaConfig(**WIDE)))
    forward, ids = backbone.native, torch.randint(0, 97, (6, 40))
    lengths, widths = [9, 31, 7, 12, 1, 20], [3, 5, 1, 2, 4, 5]
    assert len(native._parts([5] * 6, forward._once)) == 1
    with torch.inference_mode():
        several = fed(forward, ids, lengths, 5, 60, widths)[1]
        threads = fed(forward, ids, lengths, 5, 60, widths, threads=3)[1]
        assert torch.equal(several, threads)
        for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            (alone,) = fed(forward, ids[row : row + 1], [length], width, length + width)[1]
            assert torch.equal(several[row, :width], alone)
            assert not several[row, width:].any(), "padding"
            assert torch.equal(backbone.logits(several)[row, :width], backbone.logits(alone))


@pytest.mark.parametrize("slots", [1, 5])
def test_verified_drafts_have_ars_own_numbers(slots):
    """A token's logits among drafts, rivals and fans are those it has in AR, to the last bit: no text can differ."""
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")
    assert checkpoint.backbone.native is not None
    expected, numbers = answers_and_logits(checkpoint, ArSettings(), 3)
    answers, others = answers_and_logits(checkpoint, FluidSettings(slot_budget=64), slots)
    assert answers == expected
    shared = numbers.keys() & others.keys()
    assert len(shared) > 20
    assert all(others[place] == numbers[place] for place in shared)


def test_it_follows_weights_that_change():
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.randint(0, 97, (2, 9))
    with torch.inference_mode():
        before = fed(backbone.native, ids, [4, 4], 5, 9)[1]
    for change in (backbone.model.model.layers[1].mlp.up_proj.weight, backbone.model.model.norm.weight):
        with torch.no_grad():
            change.mul_(1.5)
        with torch.inference_mode():
            compiled_hidden, expected = (
                fed(each, ids, [4, 4], 5, 9)[1] for each in (backbone.native, by_torch(backbone))
            )
        assert torch.allclose(compiled_hidden, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(compiled_hidden, before, atol=1e-3)


def test_what_is_no_number_stays_none_and_stays_in_its_row():
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.tensor([[3, 5, 7], [3, 96, 7], [3, 5, 7]])
    with torch.no_grad():
        backbone.model.model.embed_tokens.weight[96] = torch.nan
    cache = KVCache(3, 3)
    hidden = backbone.forward(ids, cache.set_write_positions(0, [0] * 3, 3, ids.device), cache)
    assert hidden.isfinite().all(-1).tolist() == [[True] * 3, [True, False, False], [True] * 3]
    assert torch.equal(hidden[0], hidden[2])


def test_scores_without_bounds_are_told():
    """Queries and keys whose products are infinite: what comes of them is no number, as in torch."""
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.tensor([[3, 5, 7, 11]])
    attention = backbone.model.model.layers[1].self_attn
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            part.weight.mul_(1e25)
    with torch.inference_mode():
        finite, expected = (fed(each, ids, [2], 2, 4)[0].isfinite() for each in (backbone.native, by_torch(backbone)))
    assert not expected.all()
    assert torch.equal(finite, expected)


@pytest.mark.parametrize(
    ("ids", "place", "column", "row", "total"),
    [
        (97, 0, 0, 0, 3), (-1, 0, 0, 0, 3), (5, -1, 0, 0, 3), (5, 0, 3, 0, 3), (5, 0, 3, 0, 4), (5, 0, -1, 0, 3),
        (5, 0, 1, 0, 1), (5, 0, 0, 1, 3), (5, 0, 0, -1, 3),
    ],
)  # fmt: skip
def test_what_lies_outside_is_refused_and_nothing_written(ids, place, column, row, total):
    backbone, cache = Backbone(model_of(CONFIGS["llama"])), KVCache(1, 3)
    columns = torch.tensor([[column]])
    cache.set_write_columns(row, columns, total)
    intervals = attention_masks.AttentionIntervals(
        torch.tensor([[0]]), torch.tensor([[attention_masks.ALWAYS]]), torch.tensor([[place]])
    )
    with pytest.raises(IndexError, match="none of 97"):
        backbone.native(
            torch.tensor([[ids]]), attention_masks.AttentionPlan(columns, total, intervals=intervals), cache
        )
    assert not any(slab.any() for slab in cache._slabs.values())


def test_columns_that_do_not_follow_one_another_are_refused():
    """Two columns cached and two fed are more than three."""
    backbone, cache, columns = Backbone(model_of(CONFIGS["llama"])), KVCache(1, 3), torch.tensor([[2, 1]])
    cache.set_write_columns(0, columns, 3)
    with pytest.raises(IndexError, match="outside the cache"):
        backbone.native(torch.tensor([[5, 5]]), attention_masks.AttentionPlan(columns, 3), cache)


@pytest.mark.parametrize("threads", [1, 3])
def test_it_reads_whom_the_masks_say(threads, monkeypatch):
    """Ragged rows of fans, of texts that part, both ways, padded; a row of no slots; drafts behind the window."""
    monkeypatch.setattr(native, "WORTH", 1e5)
    backbone, chance = Backbone(model_of(LlamaConfig(**WIDE))), random.Random(0)
    lengths, slots, window = [9, 0, 60, 31, 3], 12, backbone.window
    ids, widths = torch.randint(0, 97, (5, 64)), [12, 5, 12, 0, 7]
    order = torch.tensor(
        [sorted(chance.randrange(4) * attention_masks.MAX_STEPS + chance.randrange(3) for _ in range(12)) for _ in ids]
    )
    until = torch.tensor([[chance.choice((0, 2, 3, 9)) * attention_masks.MAX_STEPS for _ in range(12)] for _ in ids])
    places = torch.tensor([[chance.randrange(9) for _ in range(12)] for _ in ids])
    for row, width in enumerate(widths):
        until[row, width:] = attention_masks.NEVER
    for intervals in (
        attention_masks.AttentionIntervals(order, until, places),
        attention_masks.bidirectional(torch.tensor([12, 5, 3, 0, 0]), slots),
    ):
        hidden = []
        for forward in (backbone.native, by_torch(backbone)):
            cache = KVCache(5, 80)
            cache.set_write_positions(0, [0] * 5, 60, ids.device)
            forward(ids[:, :60], attention_masks.AttentionPlan(cache.write_columns[1], 60), cache)
            reading = replace(
                cache.set_write_positions(0, lengths, slots, ids.device), widths=widths, intervals=intervals
            )
            monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
            hidden.append(forward(ids[:, :slots], reading, cache))
            monkeypatch.undo()
        assert int(reading.positions.max()) >= window
        assert hidden[0].isfinite().all(), "slots that read nothing, too"
        for row, width in enumerate(widths):
            readable = reading.mask()[row, :width].any(-1)
            assert torch.allclose(hidden[0][row, :width][readable], hidden[1][row, :width][readable], atol=1e-4)


@pytest.mark.parametrize(("rows", "size"), [(0, 9), (1, 4), (7, 33), (3, 1025)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_surest_are_those_torch_finds(rows, size, count):
    logits = 5 * torch.randn(rows, size)
    logits[:, 2] = -torch.inf
    tokens, probabilities = native.surest(logits, count)
    expected = logits.softmax(-1).topk(count)
    assert torch.equal(tokens, expected.indices)
    assert torch.allclose(probabilities, expected.values, atol=1e-6, rtol=1e-5)


def test_the_first_of_equals_is_the_surest():
    tokens, probabilities = native.surest(torch.tensor([[1.0, 3.0, 0.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]]), 3)
    assert tokens.tolist() == [[1, 3, 4], [0, 1, 2]]
    assert probabilities[1].tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize(("hidden_size", "k_max"), [(192, 16), (36, 1), (7, 5)])
def test_strides_are_the_k_heads(hidden_size, k_max):
    """As its own modules say, whoever copies, widens or changes it meanwhile; and none outlives it."""
    head, hidden, before = fluid_model.KHead(hidden_size, k_max), torch.randn(50, hidden_size), len(native._heads)
    for weight in head.parameters():
        weight.data.normal_()
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(head.stride(hidden), head(hidden).argmax(-1) + 1)
            assert torch.equal(head.stride(hidden[:0]), hidden.new_zeros(0, dtype=torch.long))
        assert len(native._heads) == before + 1
        with torch.no_grad():
            head[2].weight.neg_()
    other = copy.deepcopy(head).double()
    assert torch.equal(other.stride(hidden), head.stride(hidden))
    del head
    assert len(native._heads) == before


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 34, "num_attention_heads": 2, "head_dim": 8},
        {"intermediate_size": 50},
        {"head_dim": 2},
        {"head_dim": 512},
    ],
)
def test_it_stands_back_from_sizes_it_does_not_take(change):
    assert Backbone(model_of(LlamaConfig(**{**SIZES, **change}))).native is None


def test_it_stands_back_from_other_dtypes_and_large_models(monkeypatch):
    assert Backbone(model_of(CONFIGS["llama"]).bfloat16()).native is None
    assert Backbone(model_of(CONFIGS["llama"]).double()).native is None
    monkeypatch.setattr(native, "MOST_BYTES", 1000)
    assert Backbone(model_of(CONFIGS["llama"])).native is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_runs_it(compiler, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    backbone = Backbone(model_of(CONFIGS["llama"]))
    assert backbone.native is None
    backbone.probe()
    assert ("no compiled forward" in caplog.text) == (compiler == "false")
    assert not [*tmp_path.rglob("*.so")]


def test_it_is_compiled_once_whoever_asks(tmp_path, monkeypatch):
    """Three processes at the same time, and one later; not optimised, which takes the compiler least time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", [flag for flag in native.FLAGS if flag != "-O3"])
    running = []
    for _ in range(3):
        running.append(os.fork())
        if running[-1] == 0:
            signal.alarm(60)
            os._exit(native.library.__wrapped__(4) is None)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in running] == [0, 0, 0]
    (made,) = (tmp_path / "fluid-eval").iterdir()
    when = made.stat().st_mtime_ns
    assert native.library.__wrapped__(4) is not None
    assert made.stat().st_mtime_ns == when


def test_threads_live_in_a_process_alone():
    """A fork has none of its parent's, and makes its own."""
    backbone = Backbone(model_of(CONFIGS["llama"]))
    assert native._each(lambda part: len(part), [range(3), range(3, 5)]) == [3, 2]
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a wait for threads that are not there would have no end
        os._exit(native._each(lambda part: len(part), [range(3), range(3, 5)]) != [3, 2])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert backbone.native is not None


@pytest.mark.parametrize("counts", [[1], [5] * 6, [1, 90, 1], [0, 0, 4], [200] + [1] * 9, [1] * 64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_are_all_rows_once(counts, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = native._parts(counts, 1e8)
    assert [row for part in parts for row in part] == list(range(len(counts)))
    assert 1 <= len(parts) <= threads


def test_answers_of_many_rows(monkeypatch):
    """The engine's own way through it, rows coming and going, on several threads."""
    monkeypatch.setattr(native, "WORTH", 1e5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")
    work = [Request(str(n), tuple(range(10 + n, 30 + 3 * n)), 20) for n in range(9)]
    compiled = {g.key: g.ids for g in fluid_model.engine_for(checkpoint, FluidSettings(), 4).generate(work)}
    checkpoint.backbone.native = None
    plain = {g.key: g.ids for g in fluid_model.engine_for(checkpoint, ArSettings(), 1).generate(work)}
    assert compiled == plain
