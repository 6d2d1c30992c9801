"""The compiled forward agrees with the explicit one in torch; its numbers do not depend on the rest of the batch."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, Request
from fluid_model.forward import attention_masks, compiled
from fluid_model.forward.attention_masks import ALWAYS, MAX_STEPS, NEVER, AttentionIntervals, AttentionPlan
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.compiled import build, threads, weights
from fluid_model.forward.kv_cache import KVCache, slot_columns

from .test_graphs import logged, requests
from .test_llama import CONFIGS, SIZES, backbone_of, model_of

pytestmark = pytest.mark.usefixtures("c_library")
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 112, "head_dim": 48, "attention_bias": True, "mlp_bias": True}


@functools.cache
def _built_by(compiler, lanes):
    return build._load(lanes), ""


@pytest.fixture(params=["gcc", "clang"])
def compiler(request, monkeypatch):
    """Compiled code of this compiler. Numbers may differ between compilers, not between batches."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    same = os.path.samefile(shutil.which("cc") or os.devnull, shutil.which(request.param))
    monkeypatch.setenv("CC", "cc" if same else request.param)  # `cc` has compiled it already
    monkeypatch.setattr(build, "_attempt", lambda lanes: _built_by(request.param, lanes))
    return request.param


def by_torch(backbone):
    """The same forward, not compiled."""
    return lambda ids, plan, cache: backbone._forward_in_torch(ids, plan, cache)


def run_twice(forward, ids, lengths, fresh, columns, widths=None, count=1):
    """Hidden states of prompts of these lengths and of more slots behind each; row 0 of the cache is another's."""
    cache, width = KVCache(len(lengths) + 1, columns), max(lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        results = []
        for start, slots in (([0] * len(lengths), width), (lengths, fresh)):
            fed = torch.stack([row[n : n + slots] for row, n in zip(ids, start, strict=True)])
            plan = cache.set_write_positions(1, start, slots, ids.device)
            results.append(forward(fed, replace(plan, widths=widths if slots == fresh else None), cache))
        return results
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stored", ["float32", "int8"])
@pytest.mark.parametrize("name", [*CONFIGS, "wide"])
def test_it_agrees_with_the_explicit_forward(name, stored, compiler):
    """Grouped heads, biases, tied embeddings, scaled positions; prompts of different length, more slots behind each."""
    backbone = backbone_of(LlamaConfig(**WIDE) if name == "wide" else CONFIGS[name], stored)
    assert backbone.forward_choice == ("compiled", f"{stored} on a CPU")
    ids, lengths = torch.randint(0, 97, (3, 14)), [9, 4, 7]
    with torch.inference_mode():
        ours = run_twice(backbone.compiled, ids, lengths, 5, 20)
        theirs = run_twice(by_torch(backbone), ids, lengths, 5, 20)
        for hidden, expected in zip(ours, theirs, strict=True):
            for row, n in enumerate(lengths):
                assert torch.allclose(hidden[row, :n], expected[row, :n], atol=1e-4, rtol=1e-4)
        hidden = torch.randn(11, backbone.compiled._tables.hidden)
        expected = backbone.model.get_output_embeddings()(hidden)
        assert torch.allclose(backbone.logits(hidden), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_rows_and_threads_change_nothing(stored, monkeypatch, compiler):
    """To the last bit: a row alone, among others, padded, with room to spare, on threads of its own."""
    monkeypatch.setattr(threads, "OPERATIONS_PER_THREAD", 1e5)
    backbone = backbone_of(LlamaConfig(**WIDE), stored)
    forward, ids = backbone.compiled, torch.randint(0, 97, (6, 40))
    lengths, widths = [9, 31, 7, 12, 1, 20], [3, 5, 1, 2, 4, 5]
    assert threads.worth(forward._weights, sum(widths)) == 1
    with torch.inference_mode():
        several = run_twice(forward, ids, lengths, 5, 60, widths)[1]
        parallel = run_twice(forward, ids, lengths, 5, 60, widths, count=3)[1]
        assert torch.equal(several, parallel)
        for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            (alone,) = run_twice(forward, ids[row : row + 1], [length], width, length + width)[1]
            assert torch.equal(several[row, :width], alone)
            assert not several[row, width:].any(), "padding"
            assert torch.equal(backbone.logits(several)[row, :width], backbone.logits(alone))


@pytest.mark.parametrize(("slots", "stored"), [(1, "float32"), (5, "float32"), (5, "bfloat16"), (5, "int8")])
def test_draft_tokens_have_the_logits_of_ar(slots, stored, compiler):
    """A token's logits in a draft tree with mask blocks are those of AR, to the last bit: no text can differ."""
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype=stored)
    assert checkpoint.backbone.compiled is not None
    work = requests(checkpoint, 10)
    expected, numbers = logged(checkpoint, ArSettings(), 3, work)
    answers, others = logged(checkpoint, FluidSettings(slot_budget=64), slots, work)
    assert answers == expected
    shared = numbers.keys() & others.keys()
    assert len(shared) > 20
    assert all(others[place] == numbers[place] for place in shared)


def test_it_follows_weights_that_change():
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.randint(0, 97, (2, 9))
    with torch.inference_mode():
        before = run_twice(backbone.compiled, ids, [4, 4], 5, 9)[1]
    for change in (backbone.model.model.layers[1].mlp.up_proj.weight, backbone.model.model.norm.weight):
        with torch.no_grad():
            change.mul_(1.5)
        with torch.inference_mode():
            after, expected = (
                run_twice(each, ids, [4, 4], 5, 9)[1] for each in (backbone.compiled, by_torch(backbone))
            )
        assert torch.allclose(after, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(after, before, atol=1e-3)


def test_nan_stays_in_its_row():
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.tensor([[3, 5, 7], [3, 96, 7], [3, 5, 7]])
    with torch.no_grad():
        backbone.model.model.embed_tokens.weight[96] = torch.nan
    cache = KVCache(3, 3)
    hidden = backbone.forward(ids, cache.set_write_positions(0, [0] * 3, 3, ids.device), cache)
    assert hidden.isfinite().all(-1).tolist() == [[True] * 3, [True, False, False], [True] * 3]
    assert torch.equal(hidden[0], hidden[2])


def test_infinite_attention_scores_are_not_hidden():
    """Queries and keys whose products are infinite give non-finite numbers, as in torch."""
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.tensor([[3, 5, 7, 11]])
    attention = backbone.model.model.layers[1].self_attn
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            part.weight.mul_(1e25)
    with torch.inference_mode():
        finite, expected = (
            run_twice(each, ids, [2], 2, 4)[0].isfinite() for each in (backbone.compiled, by_torch(backbone))
        )
    assert not expected.all()
    assert torch.equal(finite, expected)


@pytest.mark.parametrize(
    ("ids", "place", "column", "row", "total"),
    [
        (97, 0, 0, 0, 3), (-1, 0, 0, 0, 3), (5, -1, 0, 0, 3), (5, 0, 3, 0, 3), (5, 0, 3, 0, 4), (5, 0, -1, 0, 3),
        (5, 0, 1, 0, 1), (5, 0, 0, 1, 3), (5, 0, 0, -1, 3),
    ],
)  # fmt: skip
def test_out_of_bounds_is_refused_and_nothing_written(ids, place, column, row, total):
    backbone, cache = Backbone(model_of(CONFIGS["llama"])), KVCache(1, 3)
    columns = torch.tensor([[column]])
    cache.set_write_columns(row, columns, total)
    intervals = AttentionIntervals(torch.tensor([[0]]), torch.tensor([[ALWAYS]]), torch.tensor([[place]]))
    with pytest.raises(IndexError, match="none of 97"):
        backbone.compiled(torch.tensor([[ids]]), AttentionPlan(columns, total, intervals=intervals), cache)
    assert not any(slab.any() for slab in cache._layers.values())


def test_columns_that_do_not_follow_one_another_are_refused():
    """Two columns cached and two fed are more than three."""
    backbone, cache, columns = Backbone(model_of(CONFIGS["llama"])), KVCache(1, 3), torch.tensor([[2, 1]])
    cache.set_write_columns(0, columns, 3)
    with pytest.raises(IndexError, match="outside the cache"):
        backbone.compiled(torch.tensor([[5, 5]]), AttentionPlan(columns, 3), cache)


@pytest.mark.parametrize("count", [1, 3])
def test_attention_with_masks_agrees_with_torch(count, monkeypatch, compiler):
    """Ragged rows: mask blocks, branching texts, bidirectional, padding, no slots at all, drafts past the window."""
    monkeypatch.setattr(threads, "OPERATIONS_PER_THREAD", 1e5)
    backbone, chance = Backbone(model_of(LlamaConfig(**WIDE))), random.Random(0)
    lengths, slots, window = [9, 0, 60, 31, 3], 12, backbone.window
    ids, widths = torch.randint(0, 97, (5, 64)), [12, 5, 12, 0, 7]
    enter = torch.tensor(
        [sorted(chance.randrange(4) * MAX_STEPS + chance.randrange(3) for _ in range(12)) for _ in ids]
    )
    exit_ = torch.tensor([[chance.choice((0, 2, 3, 9)) * MAX_STEPS for _ in range(12)] for _ in ids])
    offsets = torch.tensor([[chance.randrange(9) for _ in range(12)] for _ in ids])
    for row, width in enumerate(widths):
        exit_[row, width:] = NEVER
    for intervals in (
        AttentionIntervals(enter, exit_, offsets),
        attention_masks.bidirectional(torch.tensor([12, 5, 3, 0, 0]), slots),
    ):
        results = []
        for forward in (backbone.compiled, by_torch(backbone)):
            cache = KVCache(5, 80)
            cache.set_write_positions(0, [0] * 5, 60, ids.device)
            forward(ids[:, :60], AttentionPlan(cache.write_columns[1], 60), cache)
            plan = cache.set_write_positions(0, lengths, slots, ids.device, widths, intervals)
            monkeypatch.setattr(torch, "get_num_threads", lambda: count)
            results.append(forward(ids[:, :slots], plan, cache))
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert int(plan.positions.max()) >= window
        assert results[0].isfinite().all(), "slots that attend to nothing, too"
        for row, width in enumerate(widths):
            attending = plan.mask()[row, :width].any(-1)
            ours, theirs = (result[row, :width][attending] for result in results)
            assert torch.allclose(ours, theirs, atol=1e-4)


@st.composite
def draft_trees(draw):
    """Rows of random draft trees with mask blocks, in any order, padded: cached lengths, and (token, step, parents).

    parents: of each token, -1 for the first. Tokens are in preorder, so a parent is one of the last token's ancestors.
    """
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents = [-1]
        for token in range(1, draw(st.integers(1, 8))):
            ancestors, above = [], token - 1
            while above >= 0:
                ancestors.append(above)
                above = parents[above]
            parents.append(draw(st.sampled_from(ancestors)))
        blocks = [draw(st.integers(0, 3)) for _ in parents]
        slots = [(token, step) for token, block in enumerate(blocks) for step in range(block + 1)]
        rows.append((draw(st.integers(0, 5)), parents, draw(st.permutations(slots))))
    return rows, max(len(slots) for _, _, slots in rows) + draw(st.integers(0, 3))


def depth(parents, token):
    return 0 if parents[token] < 0 else 1 + depth(parents, parents[token])


def naive_mask(rows, slots, total):
    """Walks up from each query: it attends to itself, to every slot on the way, and to all cached tokens."""
    mask = torch.zeros(len(rows), slots, total, dtype=torch.bool)
    for row, (cached, parents, fed) in enumerate(rows):
        for query, (token, step) in enumerate(fed):
            mask[row, query, :cached] = True
            while token >= 0:
                mask[row, query, cached + fed.index((token, step))] = True
                token, step = (token, step - 1) if step else (parents[token], 0)
    return mask


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draft_trees())
def test_one_mask_rule(compiler, tree):
    """The mask of compiled attention, of torch, and of a naive walk along parents are equal."""
    rows, slots = tree
    enter, offsets = (torch.full((len(rows), slots), 3 * MAX_STEPS + 1) for _ in range(2))
    exit_ = torch.full((len(rows), slots), NEVER)
    for row, (_, parents, fed) in enumerate(rows):
        ends = [token + 1 for token in range(len(parents))]  # behind a token's last descendant
        for token in reversed(range(1, len(parents))):
            ends[parents[token]] = max(ends[parents[token]], ends[token])
        for slot, (token, step) in enumerate(fed):
            enter[row, slot] = token * MAX_STEPS + step
            exit_[row, slot] = (token + 1 if step else ends[token]) * MAX_STEPS
            offsets[row, slot] = depth(parents, token) + step
    lengths, widths = [cached for cached, _, _ in rows], [len(fed) for _, _, fed in rows]
    columns, total = slot_columns(lengths, slots), max(lengths) + slots
    plan = AttentionPlan(columns, total, widths, AttentionIntervals(enter, exit_, offsets))
    ours, expected = compiled.attention_mask(plan, 4), naive_mask(rows, slots, total)
    assert torch.equal(ours, expected)
    for row, width in enumerate(widths):
        assert torch.equal(plan.mask()[row, :width], expected[row, :width])
    chain = AttentionPlan(columns, total)
    assert torch.equal(compiled.attention_mask(chain, 4), chain.mask())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 34, "num_attention_heads": 2, "head_dim": 8},
        {"intermediate_size": 50},
        {"head_dim": 2},
        {"head_dim": 512},
    ],
)
def test_other_sizes_run_in_torch(change):
    backbone = Backbone(model_of(LlamaConfig(**{**SIZES, **change})))
    assert backbone.compiled is None
    assert backbone.forward_choice.kind == "explicit"
    assert "head" in backbone.forward_choice.reason


def test_other_dtypes_and_large_models_run_in_torch(monkeypatch):
    for model, reason in (
        (model_of(CONFIGS["llama"]).half(), "float16"),
        (model_of(CONFIGS["llama"]).double(), "float64"),
    ):
        kind, why = Backbone(model).forward_choice
        assert kind == "explicit"
        assert reason in why
    assert Backbone(model_of(CONFIGS["llama"])).forward_choice == ("compiled", "float32 on a CPU")
    monkeypatch.setattr(weights, "free_bytes", lambda: 1000)
    kind, why = Backbone(model_of(CONFIGS["llama"])).forward_choice
    assert (kind, "MiB" in why) == ("explicit", True)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(threads, "OPERATIONS_PER_THREAD", 1e4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_threads_live_in_a_process_alone(two_threads):
    """A fork has none of its parent's, and makes its own."""
    backbone, ids = Backbone(model_of(CONFIGS["llama"])), torch.randint(0, 97, (2, 9))
    assert threads.worth(backbone.compiled._weights, 1) == 2
    before = run_twice(backbone.compiled, ids, [4, 4], 5, 9)[1]
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a wait for threads that are not there would have no end
        os._exit(not torch.equal(run_twice(backbone.compiled, ids, [4, 4], 5, 9)[1], before))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_callers_on_several_threads(two_threads):
    """One of them has the helpers, the other works alone; both get the same numbers."""
    backbone, ids = Backbone(model_of(LlamaConfig(**WIDE))), torch.randint(0, 97, (2, 30))
    expected = run_twice(backbone.compiled, ids, [20, 9], 5, 30)[1]
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(lambda _: run_twice(backbone.compiled, ids, [20, 9], 5, 30)[1], range(40))
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(("weights", "slots", "count"), [(1, 1, 1), (10**7, 1, 1), (10**7, 20, 4), (2 * 10**7, 1, 3)])
def test_threads_worth_waking(weights, slots, count, monkeypatch):
    """Eight slots wait for the weights as long as one; torch's number is never passed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert threads.worth(weights, slots) == count
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert threads.worth(weights, slots) == min(count, 2)


def test_answers_of_many_rows(monkeypatch):
    """The engine's own way through it, rows coming and going, on several threads."""
    monkeypatch.setattr(threads, "OPERATIONS_PER_THREAD", 1e5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")
    work = [Request(str(n), tuple(range(10 + n, 30 + 3 * n)), 20) for n in range(9)]
    ours = {g.key: g.ids for g in fluid_model.engine_for(checkpoint, FluidSettings(), 4).generate(work)}
    checkpoint.backbone.compiled = None
    plain = {g.key: g.ids for g in fluid_model.engine_for(checkpoint, ArSettings(), 1).generate(work)}
    assert ours == plain
