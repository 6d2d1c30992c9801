"""What a training tells of itself on held-out rows, against plain forwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bench.field.plain import causal, forward
from fluid_model.train.masked_layouts import CanvasLayout
from fluid_model.train.measure import HeldOut, accepted_length
from fluid_model.train.row_layouts import AllMaskLayout, Example, NoisedBlockLayout

from .tiny import fluid_checkpoint

EXAMPLES = [Example(tuple(range(5, 25)), ((6, 20),)), Example((9, 9, 9, 9, 30, 31, 9, 9, 9, 9, 9, 9), ((2, 12),))]
PACKS = [tuple(EXAMPLES), (EXAMPLES[0],)]


def lucky(checkpoint):
    """Makes the model say 9 always, which is right at times."""
    head = checkpoint.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    bias = torch.zeros(head.weight.shape[0]).index_fill(0, torch.tensor(9), 5.0)
    head.register_forward_hook(lambda _, __, out: out + bias)


def held_out(checkpoint, full, *, causal):
    return HeldOut(checkpoint.model, PACKS, full, batch=2, causal=causal, multiple=1)


def test_accepted_counts_right_guesses_in_a_row():
    """Of fans of 3 after every response position of the second example: labels two to four ahead that are 9."""
    checkpoint = fluid_checkpoint()
    lucky(checkpoint)
    mask = checkpoint.mask_id
    figures = held_out(checkpoint, AllMaskLayout(mask, 3, probability=1.0), causal=True).measure(checkpoint.model)
    runs = []
    for example in (*PACKS[0], *PACKS[1]):
        ((start, end),) = example.spans
        for anchor in range(start - 1, end - 2):
            runs.append(accepted_length([token == 9 for token in example.ids[anchor + 2 : min(anchor + 5, end)]]))
    assert figures["accepted"] == pytest.approx(1 + sum(runs) / len(runs))


def test_accepted_in_blocks_and_on_a_canvas():
    checkpoint = fluid_checkpoint()
    lucky(checkpoint)
    mask = checkpoint.mask_id
    blocks = held_out(checkpoint, NoisedBlockLayout(mask, 1, 5, noise_level=1.0), causal=True).measure(checkpoint.model)
    runs = []
    for example in (*PACKS[0], *PACKS[1]):
        ((start, end),) = example.spans
        for low in range(start, end, 5):
            rest = [*example.ids[low + 1 : min(low + 5, end)], *[1] * max(0, low + 5 - max(end, low + 1))]
            runs.append(accepted_length([token == 9 for token in rest[:4]]))
    assert blocks["accepted"] == pytest.approx(1 + sum(runs) / len(runs))
    canvas = held_out(checkpoint, CanvasLayout(mask, 1, noise_level=1.0), causal=False).measure(checkpoint.model)
    assert canvas == {"accepted": pytest.approx((0 + 2 + 0) / 3)}


def test_drift_is_the_divergence_from_the_parent():
    checkpoint = fluid_checkpoint()
    model = checkpoint.model
    watch = held_out(checkpoint, AllMaskLayout(checkpoint.mask_id, 3), causal=True)
    assert watch.measure(model)["drift"] == pytest.approx(0, abs=2e-2), "up to bfloat16 of the parent's logits"

    def answers():
        logits = []
        for example in (*PACKS[0], *PACKS[1]):
            ((start, end),) = example.spans
            logits.append(forward(checkpoint, example.ids, causal(len(example.ids)))[start - 1 : end - 1])
        return torch.cat(logits).log_softmax(-1)

    before = answers()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    after = answers()
    expected = functional.kl_div(after, before, log_target=True, reduction="batchmean")
    assert watch.measure(model)["drift"] == pytest.approx(float(expected), rel=0.02)
    assert float(expected) > 0.1


def test_accepted_length():
    assert [accepted_length(correct) for correct in ([], [False, True], [True, True, False, True], [True] * 3)] == [
        0,
        0,
        2,
        3,
    ]
