"""Settings that give the form public code trains, where it is not the default here: each against its own formula."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

import fluid_model
from fluid_model import ConfigError
from fluid_model.train.losses import best_stride
from fluid_model.train.masked_layouts import CanvasLayout
from fluid_model.train.row_layouts import (
    IGNORE,
    AllMaskLayout,
    Example,
    pack_rows,
    weigh_per_example,
    with_mask_blocks,
)
from fluid_model.train.run import train
from fluid_model.train.stages import HorizonCalibration, collate, row_loss, slot_losses

from .test_train import recipe_for
from .tiny import fluid_checkpoint, save_model

K = 4


def strides(checkpoint, example, tau, *, past_end):
    """K* at every anchor of the example, in their order."""
    rule = AllMaskLayout(checkpoint.mask_id, K, probability=1.0, past_end=past_end)
    row = with_mask_blocks(example, rule, random.Random(0))
    _, losses, valid = HorizonCalibration(checkpoint.model, K, [tau]).block_losses(collate([row]))
    return best_stride(losses, valid, torch.tensor([tau]))[0].tolist()


@pytest.mark.parametrize("tau", [5.4, 5.6, 5.8])
def test_past_end_counts_slots_without_a_token_at_a_loss_of_0(tau):
    """FLUID's public code: the mean of the first k losses is divided by k, whether or not the slots have a label."""
    checkpoint = fluid_checkpoint(seed=3)
    example = Example(tuple(range(5, 25)), ((6, 12), (15, 20)))
    anchors = [anchor for start, end in example.spans for anchor in range(start - 1, end - 1)]
    expected = []
    for anchor in anchors:
        end = next(end for start, end in example.spans if start - 1 <= anchor < end)
        fed = torch.tensor([[*example.ids[: anchor + 1], *[checkpoint.mask_id] * K]])
        with torch.no_grad():
            logits = checkpoint.model(input_ids=fed).logits[0, anchor + 1 :]
        places = [anchor + s + 1 for s in range(1, K + 1)]
        loss = [
            float(functional.cross_entropy(logits[s], torch.tensor(example.ids[place]))) if place < end else 0.0
            for s, place in enumerate(places)
        ]
        expected.append(max((k for k in range(1, K + 1) if sum(loss[:k]) / k < tau), default=1))
    assert strides(checkpoint, example, tau, past_end=True) == expected
    real = strides(checkpoint, example, tau, past_end=False)
    assert len(real) == len(anchors) - 2, "a response's last token but one has nothing behind it to say"
    assert expected[5] == expected[10] == K, "and is said to be worth the whole stride in the public form"
    assert max(real[3], real[4]) < K


def test_slots_past_the_end_carry_no_loss_and_leave_packs_alone():
    rule = AllMaskLayout(9, K, probability=1.0, past_end=True)
    example = Example(tuple(range(20, 27)), ((3, 7),))
    rows = [with_mask_blocks(example, rule, random.Random(0)) for _ in range(2)]
    assert sum(label == IGNORE for label in rows[0].labels) > sum(
        label == IGNORE for label in with_mask_blocks(example, AllMaskLayout(9, K, 1.0), random.Random(0)).labels
    )
    assert (
        rows[0].diff_count
        == sum(rows[0].diff_weight)
        == sum(label != IGNORE for label, step in zip(rows[0].labels, rows[0].step, strict=True) if step)
    )
    assert len(pack_rows(rows).ids) == 2 * len(rows[0].ids)


def test_llada_per_row_is_its_guidelines_loss():
    """Sum over masked tokens of loss / t / answer length, mean over rows; its end tokens count in the length."""
    checkpoint = fluid_checkpoint()
    model, rule = checkpoint.model, CanvasLayout(checkpoint.mask_id, 1, 24)
    examples = [Example(tuple(range(5, 25)), ((4, 20),)), Example(tuple(range(30, 40)), ((7, 10),))]
    rows = [rule.build(example, random.Random(n), 0) for n, example in enumerate(examples)]
    with torch.no_grad():
        losses = iter(slot_losses(model, model, collate(rows)).tolist())
        by_slot = float(row_loss(model, model, collate(rows), (0.0, 1.0))[0])
        per_row = float(
            row_loss(
                model,
                model,
                collate([weigh_per_example(rule.build(e, random.Random(n), 0)) for n, e in enumerate(examples)]),
                (0.0, 1.0),
            )[0]
        )
    sums, lengths = [], []
    for row, example in zip(rows, examples, strict=True):
        masked = [slot for slot, label in enumerate(row.labels) if label != IGNORE]
        sums.append(sum(next(losses) * row.diff_weight[slot] for slot in masked))
        lengths.append(len(row.ids) - example.spans[0][0])
    assert per_row == pytest.approx(sum(s / n for s, n in zip(sums, lengths, strict=True)) / 2, rel=1e-5)
    assert by_slot == pytest.approx(sum(sums) / sum(lengths), rel=1e-5)
    assert per_row != pytest.approx(by_slot, rel=1e-3)


def test_an_adapter_is_put_where_it_is_asked_for_and_the_mask_stays_if_told(tmp_path):
    parent = save_model(tmp_path / "parent")
    before = fluid_model.load(str(parent)).model.state_dict()
    mask = "<|mask|>"
    made = {}
    for name, lora in (("some", {"targets": ["q_proj"], "train_mask": False}), ("all", {})):
        train(recipe_for(tmp_path, name, "fluid-hybrid", parent, lora={"rank": 2, "alpha": 4, **lora}))
        made[name] = fluid_model.load(str(tmp_path / name))
    changed = {
        name: {
            key.split(".")[-2]
            for key, value in before.items()
            if "proj" in key and not torch.equal(value, checkpoint.model.state_dict()[key])
        }
        for name, checkpoint in made.items()
    }
    assert changed["some"] == {"q_proj"}
    assert len(changed["all"]) == 7
    mean = before["model.embed_tokens.weight"].mean(0)
    rows = {
        name: c.model.get_input_embeddings().weight[c.tokenizer.convert_tokens_to_ids(mask)] for name, c in made.items()
    }
    assert torch.allclose(rows["some"], mean, atol=1e-6)
    assert not torch.allclose(rows["all"], mean, atol=1e-4)
    with pytest.raises(ConfigError, match=r"lora\.targets=\['nowhere'\]"):
        train(recipe_for(tmp_path, "x", "fluid-hybrid", parent, lora={"targets": ["nowhere"]}))
