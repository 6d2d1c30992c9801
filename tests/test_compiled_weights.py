"""Packed weights: every number in its panel, and no second copy where memory does not hold it."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from fluid_model.forward import compiled, int8_rows
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.compiled import weights

from .test_compiled import WIDE, run_twice
from .test_llama import CONFIGS, backbone_of

pytestmark = pytest.mark.usefixtures("c_library")
LANES = 4
VECTORS = {torch.float32: 2, torch.bfloat16: 4, torch.int8: 4}


def unpacked(linear, dtype):
    """(N, K), read back from panels as gemm.h describes them."""
    parts, vectors = 2 if dtype == torch.bfloat16 else 1, VECTORS[dtype]
    panels, width = -(-linear.outputs // (vectors * LANES)), vectors * LANES
    held = (ctypes.c_char * (panels * linear.inputs * width * dtype.itemsize)).from_address(linear.panels)
    rows = torch.frombuffer(bytearray(held), dtype=dtype).view(panels, linear.inputs, -1, LANES, parts)
    return rows.permute(0, 2, 4, 3, 1).reshape(-1, linear.inputs)  # column = (group of vectors, part of a word, lane)


@pytest.mark.parametrize("dtype", VECTORS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outputs", [(8,), (3,), (5, 20, 7), (8, 16, 1)])
@pytest.mark.parametrize("expected", [0, 1 << 24])
def test_every_weight_is_in_its_panel(outputs, threads, expected, dtype, monkeypatch):
    """Maps side by side need not end with a panel; the last one is filled up with zeros, whatever the memory held."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weights_of = [(50 * torch.randn(rows, 9)).to(dtype) for rows in outputs]
    packed = weights.PackedWeights(LANES, compiled.library(LANES), expected)
    monkeypatch.setattr(torch, "empty", lambda size, dtype: torch.full((size,), 77, dtype=dtype))
    linear = packed.matrix(weights_of)
    weight, held = torch.cat(weights_of), unpacked(linear, dtype)
    assert (linear.inputs, linear.outputs) == (9, len(weight))
    assert torch.equal(held[: len(weight)], weight)
    assert not held[len(weight) :].any()


def test_int8_has_a_scale_a_row():
    """Integers and scales of maps side by side; a row of zeros stays one, and rounded weights are not rounded again."""
    maps = [nn.Linear(9, rows) for rows in (5, 20)]
    with torch.no_grad():
        maps[1].weight[3] = 0
    packed = weights.PackedWeights(LANES, compiled.library(LANES), 0, int8=True)
    linear = packed.linear(maps)
    scales = torch.tensor(list((ctypes.c_float * 25).from_address(linear.scales)))
    values = unpacked(linear, torch.int8)[:25] * scales[:, None]
    weight = torch.cat([each.weight.detach() for each in maps])
    assert not values[8].any()
    assert (values - weight).abs().amax(1).le(0.51 * scales).all()
    assert unpacked(linear, torch.int8)[:25].abs().amax(1).tolist() == [127] * 8 + [0] + [127] * 16
    integers, again = int8_rows.rounded(values)
    assert torch.equal(integers, unpacked(linear, torch.int8)[:25])
    assert torch.allclose(again[:8], scales[:8])


@pytest.mark.parametrize("name", [*CONFIGS, "wide"])
def test_bfloat16_has_the_bits_of_float32(name):
    """Weights that are stored in bfloat16 give what the same numbers stored in float32 give: sums have one order."""
    narrow = backbone_of(LlamaConfig(**WIDE) if name == "wide" else CONFIGS[name], "bfloat16")
    assert narrow.forward_choice == ("compiled", "bfloat16 on a CPU")
    wide, ids, lengths = Backbone(copy.deepcopy(narrow.model).float()), torch.randint(0, 97, (3, 24)), [9, 4, 7]
    with torch.inference_mode():
        ours, expected = (run_twice(each.compiled, ids, lengths, 15, 30) for each in (narrow, wide))
        assert all(map(torch.equal, ours, expected))
        assert torch.equal(narrow.logits(ours[1]), wide.logits(expected[1]))


def test_a_copy_must_fit_into_free_memory(monkeypatch):
    model = [torch.zeros(1 << 20)]  # 4 MiB
    assert weights.free_bytes() > 1 << 20
    assert not weights.no_room(model)
    monkeypatch.setattr(weights, "free_bytes", lambda: 6 << 20)
    assert not weights.no_room(model)
    monkeypatch.setattr(weights, "free_bytes", lambda: 5 << 20)
    assert weights.no_room(model) == "a second copy of the weights takes 4 MiB, and 5 MiB of memory are free"


def test_a_copy_as_int8_takes_a_quarter(monkeypatch):
    monkeypatch.setattr(weights, "free_bytes", lambda: 2 << 20)
    model = [torch.zeros(1 << 20)]
    assert weights.no_room(model)
    assert not weights.no_room(model, int8=True)


def test_hidden_states_of_any_number_format_are_projected():
    """transformers' own forward of a bfloat16 model gives them in bfloat16."""
    backbone = backbone_of(CONFIGS["llama"], "bfloat16")
    hidden = torch.randn(9, backbone.config.hidden_size).bfloat16()
    assert torch.equal(backbone.compiled.logits(hidden), backbone.compiled.logits(hidden.float()))
