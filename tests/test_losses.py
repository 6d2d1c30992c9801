"""Losses and labels of the training stages, each against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_model.train.losses import best_stride, combine_losses, horizon_loss, horizon_target


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.lists(st.floats(0, 6, width=32), min_size=6, max_size=6), min_size=1, max_size=5),
    width=st.integers(1, 6),
    taus=st.lists(st.floats(0.1, 5), min_size=1, max_size=3),
)
def test_best_stride_by_brute_force(losses, width, taus):
    table = torch.tensor(losses, dtype=torch.float64)
    counted = torch.zeros_like(table, dtype=torch.bool)
    counted[:, :width] = True
    strides = best_stride(table, counted, torch.tensor(taus, dtype=torch.float64))
    for t, tau in enumerate(taus):
        for a, row in enumerate(table.tolist()):
            below = [k for k in range(1, width + 1) if sum(row[:k]) / k < tau - 1e-9]
            edge = [k for k in range(1, width + 1) if abs(sum(row[:k]) / k - tau) <= 1e-9]
            if not edge:
                assert int(strides[t, a]) == max(below, default=1)


def test_horizon_target_and_loss():
    target = horizon_target(torch.tensor([1, 4]), 8)
    assert target.sum(-1).tolist() == pytest.approx([1, 1])
    assert target.argmax(-1).tolist() == [0, 3]
    assert float(target[1, 2] / target[1, 3]) == pytest.approx(float(torch.tensor(-1 / 4.5).exp()))
    logits = torch.randn(2, 8)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    assert float(horizon_loss(logits, target)) == pytest.approx(float(expected), abs=1e-6)


def test_the_two_terms_are_kept_apart():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    ar, diff = torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 1])
    total, l_ar, l_diff = combine_losses(losses, ar, diff, torch.tensor(3.0), (1.0, 0.5))
    assert (float(total), float(l_ar), float(l_diff)) == (12.0, 2.0, 20.0)
    assert float(combine_losses(losses, ar, diff, torch.tensor(3.0), None)[0]) == pytest.approx(64 / 5)
    assert float(combine_losses(losses[:2], ar[:2], diff[:2], torch.tensor(0.0), (1.0, 1.0))[2]) == 0
