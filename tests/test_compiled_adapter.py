"""A gated adapter, compiled: mask slots have the numbers of merged weights, all others the model's own."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig

from fluid_model.forward.attention_masks import MAX_STEPS, NEVER, AttentionIntervals
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.compiled import CompiledForward, weights
from fluid_model.forward.gated_lora import GatedLora
from fluid_model.forward.kv_cache import KVCache
from fluid_model.forward.llama import LINEAR

from .test_compiled import WIDE, by_torch
from .test_llama import CONFIGS, backbone_of, model_of

pytestmark = pytest.mark.usefixtures("c_library")
MASK = 5
IDS = torch.tensor([[7, MASK, MASK, 9, MASK, 11], [MASK, 3, MASK, 8, 8, 8], [1, 2, 3, 4, 6, 8]])
WIDTHS = [6, 3, 5]
"""Slots of each row: a text and mask blocks behind two of its tokens; mask slots first and last; no mask slot."""


def adapted(config, targets=(), rank=3, stored="float32"):
    """A model, an adapter of it that is far from zero, and the compiled forward of both."""
    backbone = backbone_of(config, stored)
    torch.manual_seed(1)
    adapter = GatedLora(backbone.model, MASK, rank, 2.0 * rank, targets)
    for weight in adapter.layers.parameters():
        weight.data.normal_(std=0.2)
    return backbone, adapter, compiled_with(backbone, adapter)


def compiled_with(backbone, adapter):
    tables = backbone.explicit.cos, backbone.explicit.sin
    forward, reason = CompiledForward.of(backbone.model, *tables, adapter, int8=backbone.int8)
    assert forward is not None, reason
    return forward


def run(forward, ids=IDS, widths=WIDTHS, lengths=(4, 2, 0), columns=16):
    """Hidden states of ragged rows behind cached tokens; a mask slot is seen by the mask slots behind it alone."""
    cache, rows = KVCache(len(ids), columns), len(ids)
    prompt = torch.arange(8, 12).expand(rows, 4)
    forward(prompt, cache.set_write_positions(0, [0] * rows, 4, ids.device), cache)
    token, enter = torch.zeros(rows, dtype=torch.long), torch.zeros_like(ids)
    for slot in range(ids.shape[1]):
        masked = ids[:, slot] == MASK
        enter[:, slot] = torch.where(masked, enter[:, slot - 1] + 1 if slot else 1, token + MAX_STEPS)
        token = torch.where(masked, token, token + MAX_STEPS)
    exits = torch.where(ids == MASK, (enter // MAX_STEPS + 1) * MAX_STEPS, 99 * MAX_STEPS)
    for row, width in enumerate(widths):
        exits[row, width:] = NEVER
    intervals = AttentionIntervals(enter, exits, torch.arange(ids.shape[1]).expand_as(ids))
    plan = cache.set_write_positions(0, list(lengths), ids.shape[1], ids.device, widths, intervals)
    with torch.inference_mode():
        return forward(ids, plan, cache)


def oracle(backbone, adapter):
    """The explicit forward in torch whose linear maps have merged weights at mask slots."""
    gate = torch.zeros(1, 1, dtype=torch.bool)

    def hook(merged):
        return lambda module, inputs, output: torch.where(
            gate[..., None], functional.linear(inputs[0], merged, module.bias), output
        )

    handles = []
    for layer, maps in zip(backbone.model.model.layers, adapter.layers, strict=True):
        for path in LINEAR:
            linear, name = layer.get_submodule(path), path.rpartition(".")[2]
            if name in maps:
                merged = linear.weight.detach() + adapter.scale * maps[name].up.detach() @ maps[name].down.detach()
                handles.append(linear.register_forward_hook(hook(merged)))

    def forward(ids, plan, cache):
        nonlocal gate
        gate = ids == MASK
        return by_torch(backbone)(ids, plan, cache)

    forward.remove = lambda: [handle.remove() for handle in handles]
    return forward


@pytest.mark.parametrize("stored", ["float32", "int8"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ("o_proj",)])
@pytest.mark.parametrize("config", [CONFIGS["llama"], LlamaConfig(**WIDE)], ids=["llama", "wide"])
def test_mask_slots_have_merged_weights(config, targets, stored):
    backbone, adapter, forward = adapted(config, targets, stored=stored)
    ours, plain, merged = run(forward), run(backbone.compiled), oracle(backbone, adapter)
    expected = run(merged)
    merged.remove()
    for row, width in enumerate(WIDTHS):
        assert torch.allclose(ours[row, :width], expected[row, :width], atol=1e-4, rtol=1e-4)
        masked = IDS[row, :width] == MASK
        assert (ours[row, :width] - plain[row, :width]).abs().amax(-1)[masked].gt(1e-2).all()


def test_over_bfloat16_it_has_the_bits_of_float32():
    narrow, adapter, forward = adapted(LlamaConfig(**WIDE), stored="bfloat16")
    wide = Backbone(copy.deepcopy(narrow.model).float())
    for ours, expected, width in zip(run(forward), run(compiled_with(wide, adapter)), WIDTHS, strict=True):
        assert torch.equal(ours[:width], expected[:width])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_tokens_have_the_bits_of_a_forward_without_adapter(stored):
    """In a batch with mask slots, which tokens do not attend to, and alone."""
    backbone, _, forward = adapted(LlamaConfig(**WIDE), stored=stored)
    ours, plain = run(forward), run(backbone.compiled)
    for row, width in enumerate(WIDTHS):
        tokens = IDS[row, :width] != MASK
        assert torch.equal(ours[row, :width][tokens], plain[row, :width][tokens])
    alone = run(forward, IDS[1:2, :3], [3], [2])
    assert torch.equal(alone[0], ours[1, :3]), "mask slots, too, have the same bits in every batch"


def test_without_mask_slots_the_adapter_is_not_read():
    backbone, adapter, forward = adapted(CONFIGS["llama"])
    for weight in adapter.layers.parameters():
        weight.data.fill_(torch.nan)
    ids = IDS.masked_fill(IDS == MASK, 6)
    assert torch.equal(run(forward, ids), run(backbone.compiled, ids))
    assert run(forward).isnan().any(), "but at mask slots it is"


def test_it_follows_an_adapter_that_changes(monkeypatch):
    _, adapter, forward = adapted(CONFIGS["llama"], ("gate_proj",))
    calls = Counter()
    pack = weights.PackedWeights.gated
    monkeypatch.setattr(weights.PackedWeights, "gated", lambda *args: calls.update("p") or pack(*args))
    before = run(forward)
    packed = calls["p"]
    assert packed > 0
    assert torch.equal(run(forward), before)
    assert calls["p"] == packed, "packed once"
    with torch.no_grad():
        adapter.layers[1]["gate_proj"].up.mul_(1.5)
    assert not torch.allclose(run(forward), before, atol=1e-4)


def test_an_adapter_whose_changes_cannot_be_noticed_is_refused():
    backbone = Backbone(model_of(CONFIGS["llama"]))
    with torch.inference_mode():
        adapter = GatedLora(backbone.model, MASK, 2, 2.0)
    forward, reason = CompiledForward.of(backbone.model, backbone.explicit.cos, backbone.explicit.sin, adapter)
    assert forward is None
    assert "inference tensors" in reason
