"""Training: layouts, labels and losses against brute force; stages that change what they should and nothing else."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import fluid_model
from fluid_model import ArSettings, ConfigError, FluidSettings, Request, masks
from fluid_model.layout import IGNORE, Example, HybridFans, MaskFans, expand, plain
from fluid_model.train.losses import best_stride, horizon, horizon_target, hybrid
from fluid_model.train.recipe import as_table, build_recipe
from fluid_model.train.run import train
from fluid_model.train.stages import collate, slot_losses

from .tiny import fluid_checkpoint, save_model

EXAMPLES = st.builds(
    lambda ids, start: Example(tuple(ids), min(start, len(ids) - 1)),
    st.lists(st.integers(2, 250), min_size=4, max_size=14),
    st.integers(1, 8),
)


@settings(max_examples=40, deadline=None)
@given(example=EXAMPLES, seed=st.integers(0, 99), stage=st.sampled_from([1, 2]))
def test_expanded_rows_by_brute_force(example, seed, stage):
    rule = HybridFans(258, 4, range(2, 258)) if stage == 1 else MaskFans(258, 4)
    row = expand(example, rule, random.Random(seed))
    real = len(example.ids)
    base = plain(example)
    assert (row.ids[:real], row.labels[:real], row.positions[:real]) == (base.ids, base.labels, list(range(real)))
    for i, label in enumerate(base.labels):
        inside = i + 1 < real and i + 1 >= example.start
        assert label == (example.ids[i + 1] if inside else IGNORE)
    for slot in range(real, len(row.ids)):
        anchor, step = row.anchor[slot], row.step[slot]
        assert anchor >= example.start - 1, "a fan hangs where a response token follows"
        assert row.positions[slot] == anchor + step
        assert row.labels[slot] == example.ids[anchor + step + 1]
        if stage == 2:
            assert row.ids[slot] == 258


@settings(max_examples=25, deadline=None)
@given(example=EXAMPLES, other=EXAMPLES, seed=st.integers(0, 99))
def test_fan_slots_never_read_another_fan(example, other, seed):
    rows = [expand(e, HybridFans(258, 4, range(2, 258)), random.Random(seed)) for e in (example, other)]
    batch = collate(rows)
    may = masks.fans(batch["anchor"], batch["step"])
    for b, row in enumerate(rows):
        for q in range(len(row.ids)):
            for k in range(batch["ids"].shape[1]):
                inside = k < len(row.ids)
                before = inside and row.step[k] == 0 and row.anchor[k] <= row.anchor[q]
                own = inside and row.step[k] > 0 and row.anchor[k] == row.anchor[q] and row.step[k] <= row.step[q]
                assert bool(may[b, q, k]) == bool(before or own)


def test_the_training_layout_is_what_the_decoder_feeds():
    """A fan's losses are those of the prefix followed by the same masks, as the sampler's canvas is fed."""
    checkpoint = fluid_checkpoint()
    model, mask = checkpoint.model, checkpoint.mask_id
    examples = [Example(tuple(range(5, 25)), 6), Example(tuple(range(40, 52)), 1)]
    rows = [expand(e, MaskFans(mask, 5, probability=0.7), random.Random(3)) for e in examples]
    with torch.no_grad():
        losses = slot_losses(model, model, collate(rows))
    found = iter(losses.tolist())
    checked = 0
    for example, row in zip(examples, rows, strict=True):
        for slot, label in enumerate(row.labels):
            if label == IGNORE:
                continue
            fed = [*example.ids[: row.anchor[slot] + 1], *[mask] * row.step[slot]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([fed])).logits[0, -1]
            expected = functional.cross_entropy(logits, torch.tensor(label))
            assert next(found) == pytest.approx(float(expected), abs=1e-4)
            checked += row.step[slot] > 0
    assert checked > 20


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
    found = best_stride(table, counted, torch.tensor(taus, dtype=torch.float64))
    for t, tau in enumerate(taus):
        for a, row in enumerate(table.tolist()):
            good = [k for k in range(1, width + 1) if sum(row[:k]) / k < tau - 1e-9]
            edge = [k for k in range(1, width + 1) if abs(sum(row[:k]) / k - tau) <= 1e-9]
            if not edge:
                assert int(found[t, a]) == max(good, default=1)


def test_horizon_target_and_loss():
    target = horizon_target(torch.tensor([1, 4]), 8)
    assert target.sum(-1).tolist() == pytest.approx([1, 1])
    assert target.argmax(-1).tolist() == [0, 3]
    assert float(target[1, 2] / target[1, 3]) == pytest.approx(float(torch.tensor(-1 / 4.5).exp()))
    logits = torch.randn(2, 8)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    assert float(horizon(logits, target)) == pytest.approx(float(expected), abs=1e-6)


def test_the_two_terms_are_kept_apart():
    losses, in_fan = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0]), torch.tensor([False, False, True, True, True])
    total, l_ar, l_diff = hybrid(losses, in_fan, 0.5)
    assert (float(total), float(l_ar), float(l_diff)) == (12.0, 2.0, 20.0)
    assert float(hybrid(losses, in_fan, None)[0]) == pytest.approx(64 / 5)
    assert float(hybrid(losses[:2], in_fan[:2], 1.0)[2]) == 0


def rows_file(folder, count=40):
    file = folder / "rows.jsonl"
    rows = [{"prompt": f"Q: {n}+1? A:", "completion": f" {n + 1}, that is {n + 1}."} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_for(folder, out, stage, parent=None, **changes):
    scratch = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    values = {
        "stage": stage, "out": str(folder / out), "model": {"parent": str(parent)} if parent else {"scratch": scratch},
        "data": {"files": [str(rows_file(folder))], "max_length": 64, "held_out": 8}, "fans": {"k_max": 4},
        "optim": {
            "steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_every": 3, "report_every": 3, "measure_every": 3,
        },
    }  # fmt: skip
    return build_recipe({**values, **changes})


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_the_chain_from_nothing_to_a_fluid_checkpoint(tmp_path, lora):
    """ar, then hybrid, then horizons: each loads as the next one's parent, and the last one decodes."""
    train(recipe_for(tmp_path, "ar", "ar"))
    parent = fluid_model.load(str(tmp_path / "ar"))
    train(recipe_for(tmp_path, "hybrid", "fluid-hybrid", tmp_path / "ar", lora=lora))
    adapted = fluid_model.load(str(tmp_path / "hybrid"))
    assert (adapted.manifest.tau, adapted.head, adapted.mask_id) == ((), None, len(parent.tokenizer))
    fresh = parent.model.get_input_embeddings().weight.mean(0)
    assert not torch.allclose(adapted.model.get_input_embeddings().weight[adapted.mask_id], fresh, atol=1e-4)
    with pytest.raises(ConfigError, match="needs a K-head"):
        fluid_model.engine_for(adapted, FluidSettings())

    told = train(recipe_for(tmp_path, "fluid", "fluid-horizon", tmp_path / "hybrid", tau=[0.5, 2.8]))
    final = fluid_model.load(str(tmp_path / "fluid"), tau=2.8)
    assert final.manifest.tau == (0.5, 2.8)
    before, after = adapted.model.state_dict(), final.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "stage 2 leaves the backbone alone"
    prompt = tuple(final.tokenizer.encode("Q: 7+1? A:"))
    texts = [
        next(fluid_model.engine_for(final, decoder).generate([Request("x", prompt, 12)])).ids
        for decoder in (ArSettings(), FluidSettings())
    ]
    assert texts[0] == texts[1]
    written = json.loads((tmp_path / "fluid" / "training.json").read_text())
    assert written["recipe_hash"] == told["recipe_hash"]
    assert build_recipe(written["recipe"]).hash == told["recipe_hash"]
    assert {"l_ar", "l_diff"} <= json.loads((tmp_path / "hybrid" / "training.json").read_text())["history"][0].keys()


def test_a_resumed_training_gives_the_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    parent = save_model(tmp_path / "parent")
    whole, broken = (recipe_for(tmp_path, name, "fluid-hybrid", parent) for name in ("whole", "broken"))
    train(whole)
    from fluid_model.train.run import StageTrainer

    loss, calls = StageTrainer.compute_loss, []

    def killed(self, model, inputs, *more, **options):
        calls.append(1)
        if model.training and self.state.global_step == 4:
            raise KeyboardInterrupt
        return loss(self, model, inputs, *more, **options)

    monkeypatch.setattr(StageTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    assert not (tmp_path / "broken").exists()
    monkeypatch.setattr(StageTrainer, "compute_loss", loss)
    train(broken, resume=True)
    a, b = (fluid_model.load(str(tmp_path / name)).model.state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "dream"}, "stage='dream' is unknown; known: ar, fluid-hybrid, fluid-horizon"),
        ({"model": {}}, "model: needs either parent or scratch"),
        ({"stage": "fluid-hybrid"}, "model.scratch: stage fluid-hybrid adapts a parent"),
        ({"tau": [1.0]}, "stage fluid-horizon needs some, other stages none"),
        ({"lora": {"rank": 2}}, "lora: stage ar trains no adapter"),
        ({"optim": {"steps": 0}}, "optim.steps=0 must be at least 1"),
        ({"optim": {"steps": 5, "lr": 1.0}}, "optim.lr is no setting; known: optim.steps"),
        ({"data": {"files": []}}, "data.files: must name at least one file"),
        ({"fans": {"noise": 1.5}}, "fans.noise=1.5 must lie in [0.0, 1.0]"),
        ({"colour": 1}, "colour is no setting; known: stage"),
    ],
)
def test_bad_recipes_fail_before_any_data_is_read(tmp_path, changes, message):
    good = as_table(recipe_for(tmp_path, "x", "ar"))
    with pytest.raises(ConfigError) as caught:
        build_recipe({**good, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ["{oops", '{"prompt": "x"}', '{"prompt": "x", "completion": ""}', '{"text": 3}'])
def test_a_bad_row_names_file_and_line(tmp_path, line):
    recipe = recipe_for(tmp_path, "x", "ar")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 41: not a training row"):
        train(recipe)
