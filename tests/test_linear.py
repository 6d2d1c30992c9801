"""Joined linear maps say what the plain ones say, by whatever kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fluid_model import linear
from fluid_model.linear import Linear, bucket, packs


def parts(bias: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(12, size, bias=bias or size == 5) for size in (8, 5, 16)]


def joined(modules: list[nn.Linear], pack: bool = True) -> Linear:
    return Linear([(each.weight, each.bias) for each in modules], pack=pack)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slots", [1, 3, 4, 10, 33, 200])
@torch.no_grad()
def test_one_map_is_all_of_them(slots, bias, pack):
    modules = parts(bias)
    assert packs([each.weight for each in modules]), "the CPU build of torch has oneDNN"
    inputs, more = torch.randn(slots, 12), torch.randn(slots, 29)
    expected = torch.cat([each(inputs) for each in modules], -1)
    found = joined(modules, pack)
    assert torch.allclose(found(inputs), expected, atol=1e-5)
    assert torch.allclose(found.filled(inputs), expected, atol=1e-5)
    assert torch.allclose(found(inputs, more.clone()), more + expected, atol=1e-5)


def test_it_follows_weights_changed_in_place():
    modules, inputs = parts(True), torch.randn(10, 12)
    found = joined(modules)
    with torch.inference_mode():
        before = found(inputs)
    with torch.no_grad():
        modules[1].weight.mul_(2.0)
        modules[1].bias.mul_(2.0)
    with torch.inference_mode():
        assert torch.allclose(found(inputs), torch.cat([each(inputs) for each in modules], -1), atol=1e-5)
        assert not torch.allclose(found(inputs), before, atol=1e-3)


def test_what_is_not_packed(monkeypatch):
    weight = torch.zeros(4, 4)
    assert packs([weight])
    assert not packs([weight, weight.bfloat16()])
    with torch.inference_mode():
        assert not packs([torch.zeros(4, 4)]), "nobody can tell whether it changes"
    monkeypatch.setattr(linear, "MOST_BYTES", 100)
    assert not packs([weight, weight]), "a large model is not held twice"


def test_other_heads_run_as_they_are():
    class Scaled(nn.Linear):
        def forward(self, inputs):
            return 3 * functional.linear(inputs, self.weight, self.bias)

    head, inputs = Scaled(12, 7), torch.randn(10, 12)
    assert torch.equal(Linear.of(head)(inputs), head(inputs))


def test_buckets_are_few_and_near():
    assert all(m <= bucket(m) <= m + m // 8 for m in range(1, 5000))
    assert bucket(0) == 0
    assert len({bucket(m) for m in range(1, 4096)}) < 90
