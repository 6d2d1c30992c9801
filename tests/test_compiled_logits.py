"""What is read off hidden states and logits by compiled code: states by place, ranks, the K-head's strides."""

from __future__ import annotations

import copy

import pytest
import torch

import fluid_model
from fluid_model.forward import compiled
from fluid_model.forward.compiled import k_head

pytestmark = pytest.mark.usefixtures("c_library")


@pytest.mark.parametrize(("rows", "size"), [(0, 9), (1, 4), (7, 33), (3, 1025), (90, 3001)])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("coarse", [False, True])
def test_ranks_are_those_of_a_stable_sort(rows, size, count, coarse):
    """Of the first rows the likeliest token alone. Also where many logits are equal: the first of them ranks first."""
    logits = 5 * torch.randn(rows, size)
    logits = logits.div(4).round() if coarse else logits
    logits[:, 2] = -torch.inf
    single = rows // 3
    first, tokens, probabilities = compiled.rank(logits, single, count)
    expected, _ = logits.softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    by_logit = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(first, by_logit[:single, 0])
    assert torch.equal(tokens, by_logit[single:, :count])
    assert torch.allclose(probabilities.double(), expected[single:, :count], atol=1e-6, rtol=1e-5)


def test_states_are_selected_by_place():
    hidden, places = torch.randn(3, 4, 5), torch.tensor([99, 99, 7, 0, 11, 7])
    assert torch.equal(compiled.select(hidden, places, 2), hidden.flatten(0, 1)[places[2:]])
    assert compiled.select(hidden.double(), places, 2) is None, "torch selects"


@pytest.mark.parametrize(("hidden_size", "k_max"), [(192, 16), (36, 1), (7, 5)])
def test_strides_are_the_k_heads(hidden_size, k_max):
    """As its own modules compute them, also after it is copied or changed; packed weights do not outlive it."""
    head, hidden, before = fluid_model.KHead(hidden_size, k_max), torch.randn(50, hidden_size), len(k_head._packed)
    for weight in head.parameters():
        weight.data.normal_()
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(head.stride(hidden), head(hidden).argmax(-1) + 1)
            assert torch.equal(head.stride(hidden[:0]), hidden.new_zeros(0, dtype=torch.long))
        assert len(k_head._packed) == before + 1
        with torch.no_grad():
            head[2].weight.neg_()
    other = copy.deepcopy(head).double()
    assert torch.equal(other.stride(hidden), head.stride(hidden))
    del head
    assert len(k_head._packed) == before
