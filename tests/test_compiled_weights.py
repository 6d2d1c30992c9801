"""Packed weights: every number in its panel, and no second copy where memory does not hold it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import nn

from fluid_model.forward import compiled
from fluid_model.forward.compiled import weights

pytestmark = pytest.mark.skipif(compiled.library(4) is None, reason="no C compiler")
LANES = 4


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outputs", [(8,), (3,), (5, 20, 7), (8, 16, 1)])
@pytest.mark.parametrize("expected", [0, 1 << 24])
def test_every_weight_is_in_its_panel(outputs, threads, expected, monkeypatch):
    """Maps side by side need not end with a panel; the last one is filled up with zeros, whatever the memory held."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    maps, width = [nn.Linear(9, rows, bias=False) for rows in outputs], 2 * LANES
    packed = weights.PackedWeights(LANES, compiled.library(LANES), expected)
    monkeypatch.setattr(torch, "empty", lambda size: torch.full((size,), torch.nan))
    linear = packed.linear(maps)
    panels = -(-sum(outputs) // width)
    held = (ctypes.c_float * (panels * 9 * width)).from_address(linear.panels)
    unpacked = torch.tensor(list(held)).view(panels, 9, width).transpose(1, 2).reshape(-1, 9)
    weight = torch.cat([each.weight.detach() for each in maps])
    assert (linear.inputs, linear.outputs) == (9, len(weight))
    assert torch.equal(unpacked[: len(weight)], weight)
    assert not unpacked[len(weight) :].any()


def test_a_copy_must_fit_into_free_memory(monkeypatch):
    model = [torch.zeros(1 << 20)]  # 4 MiB
    assert weights.free_bytes() > 1 << 20
    assert not weights.no_room(model)
    monkeypatch.setattr(weights, "free_bytes", lambda: 6 << 20)
    assert not weights.no_room(model)
    monkeypatch.setattr(weights, "free_bytes", lambda: 5 << 20)
    assert weights.no_room(model) == "a second copy of the weights takes 4 MiB, and 5 MiB of memory are free"
