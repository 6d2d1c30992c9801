"""MDLM and BD3LM as dLLM's public trainers define them (ZHZisZZ/dllm at ca17675): losses from their formulas alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ConfigError, LladaSettings, Request
from fluid_model.common.fields import assign
from fluid_model.common.files import read_toml
from fluid_model.train.chain import build_chain
from fluid_model.train.data import Filling, TrainingSet, fill_up
from fluid_model.train.masked_layouts import BlockCausalLayout, CanvasLayout
from fluid_model.train.noise import NoiseSpec
from fluid_model.train.recipe import as_table, build_recipe
from fluid_model.train.row_layouts import IGNORE, Example
from fluid_model.train.run import train, train_chain
from fluid_model.train.stage_setup import layout_of, set_up_stage
from fluid_model.train.stages import collate, row_loss

from .test_train import recipe_for, rows_file
from .tiny import llama_config, save_model

MASK, END, PAD, OFFSET = 258, 1, 0, 1e-6
EXAMPLES = [
    Example(tuple(range(5, 25)), ((6, 20),)),
    Example(tuple(range(40, 52)), ((1, 12),)),
    Example(tuple(range(100, 133)), ((16, 33),)),
]


def parent(kind):
    """A small random Llama, Qwen2 or Qwen3."""
    torch.manual_seed(0)
    shape = llama_config(vocab_size=259, head_dim=8).to_dict()
    shape.pop("model_type")
    kinds = {"llama": llama_config(vocab_size=259), "qwen2": Qwen2Config(**shape), "qwen3": Qwen3Config(**shape)}
    return AutoModelForCausalLM.from_config(kinds[kind]).float().eval()


def masked_share_and_weight(schedule, weight, t):
    """1 - alpha(t) and -alpha'(t) / (1 - alpha(t)), the slope by a difference."""

    def alpha(s):
        return 1 - s if schedule == "linear" else 1 - math.cos(math.pi / 2 * (1 - s))

    slope = (alpha(t + 1e-6) - alpha(t - 1e-6)) / 2e-6
    return 1 - alpha(t), 1.0 if weight == "uniform" else -slope / (1 - alpha(t) + OFFSET)


def block_diffusion_mask(length, block):
    """The three masks of the BD3LM paper over [noised | clean], pair by pair: (2L, 2L)."""
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            q_clean, k_clean = q >= length, k >= length
            q_block, k_block = q % length // block, k % length // block
            same_block = q_block == k_block and q_clean == k_clean
            earlier_clean = q_block > k_block and k_clean and not q_clean
            clean_past = q_block >= k_block and k_clean and q_clean
            mask[q, k] = same_block or earlier_clean or clean_past
    return mask


def public_loss(model, examples, masked, weights, *, block, shift, norm):
    """The public trainers' loss: every row whole, [noised | clean] with blocks, and its own normaliser.

    masked: token indices of each row.  weights: of each row's masked tokens.
    """
    # 1) rows of one length; padding behind has no loss, and blocks before it do not attend to it
    longest = max(len(example.ids) for example in examples)
    clean = torch.tensor([[*example.ids, *[PAD] * (longest - len(example.ids))] for example in examples])
    noised = clean.clone()
    for row, places in enumerate(masked):
        noised[row, sorted(places)] = MASK
    # 2) logits of the noised half
    fed = torch.cat([noised, clean], 1) if block else noised
    attended = block_diffusion_mask(longest, block) if block else torch.ones(longest, longest, dtype=torch.bool)
    additive = torch.zeros(attended.shape).masked_fill(~attended, torch.finfo(torch.float32).min)
    positions = torch.arange(longest).repeat(2 if block else 1).expand(len(fed), -1)
    with torch.no_grad():
        logits = model(fed, attention_mask=additive[None, None], position_ids=positions).logits[:, :longest]
    if shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    losses = functional.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    # 3) the mean
    sums = [float(losses[row, sorted(places)].sum()) * weights[row] for row, places in enumerate(masked)]
    learnt = [sum(end - start for start, end in example.spans) for example in examples]
    if norm == "slot":
        return sum(sums) / sum(learnt)
    if norm == "row":
        return sum(total / count for total, count in zip(sums, learnt, strict=True)) / len(sums)
    return sum(sums) / len(sums)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("block", [None, 1, 4, 64])
@pytest.mark.parametrize(
    ("schedule", "weight", "norm", "shift"),
    [
        ("linear", "schedule", "slot", False),
        ("cosine", "schedule", "row", True),
        ("linear", "uniform", "batch", True),
        ("cosine", "uniform", "slot", False),
    ],
)
def test_losses_are_the_public_trainers(kind, block, schedule, weight, norm, shift):
    model, noise = parent(kind), NoiseSpec(schedule, 1e-3, weight)
    if block is None:
        layout = CanvasLayout(MASK, END, shift=shift, noise=noise, divisor_offset=OFFSET)
    else:
        layout = BlockCausalLayout(MASK, END, block, shift=shift, noise=noise, divisor_offset=OFFSET)
    filling = None if block else Filling(PAD, 3)
    data = TrainingSet([(e,) for e in EXAMPLES], layout, steps=1, batch=3, seed=4, per=norm, filling=filling)
    rows = [data[draw] for draw in range(3)]
    with torch.no_grad():
        ours = float(row_loss(model, model, collate(rows), (0.0, 1.0))[0])
    # the same examples, filled up with tokens to learn: to the longest row, or to whole blocks
    examples = [EXAMPLES[place] for place in data._order(0)]
    size = [-(-len(e.ids) // block) * block if block else 33 for e in examples]
    fillers = [(END if block else PAD,) * (n - len(e.ids)) for n, e in zip(size, examples, strict=True)]
    filled = [
        Example(e.ids + more, ((e.spans[0][0], len(e.ids) + len(more)),))
        for e, more in zip(examples, fillers, strict=True)
    ]
    masked = [{row.positions[i] + shift for i, label in enumerate(row.labels) if label != IGNORE} for row in rows]
    draws = [random.Random(f"4/{draw}") for draw in range(3)]
    if block is None:
        for rng in draws:
            rng.randint(0, 0)  # end tokens behind a canvas: none
    times = [1e-3 + (1 - 1e-3) * rng.random() for rng in draws]
    weights = [masked_share_and_weight(schedule, weight, t)[1] for t in times]
    theirs = public_loss(model, filled, masked, weights, block=block, shift=shift, norm=norm)
    assert ours == pytest.approx(theirs, rel=1e-5)
    for example, places in zip(filled, masked, strict=True):
        assert places <= set(range(*example.spans[0])), "prompt tokens are never masked"
    assert all(masked)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_masks_its_share(schedule):
    noise = NoiseSpec(schedule)
    for t in (0.001, 0.1, 0.5, 0.9):
        share, weight = masked_share_and_weight(schedule, "schedule", t)
        assert noise.masked_share(t) == pytest.approx(share)
        assert noise.loss_weight(t, OFFSET) == pytest.approx(weight, rel=1e-4)
    example = Example(tuple(range(5, 205)), ((0, 200),))
    layout = CanvasLayout(MASK, END, noise=noise, noise_level=0.5)
    counts = [layout.build(example, random.Random(seed), 0).ids.count(MASK) for seed in range(40)]
    assert sum(counts) / 8000 == pytest.approx(noise.masked_share(0.5), abs=0.025)
    assert 0.25 <= min(NoiseSpec(epsilon=0.25).draw_time(random.Random(seed)) for seed in range(200)) < 0.27


def test_noised_blocks_without_a_label_are_left_out():
    """Of a row of L tokens, only blocks with a masked token stand beside the clean copy; of the prompt's, none."""
    example = Example(tuple(range(5, 69)), ((48, 64),))
    row = BlockCausalLayout(MASK, END, 8, noise_level=1.0).build(example, random.Random(0), 0)
    assert [row.step.count(step) for step in (0, 1)] == [64, 16]
    assert min(position for position, step in zip(row.positions, row.step, strict=True) if step) == 48
    none = BlockCausalLayout(MASK, END, 8, noise_level=1e-9).build(example, random.Random(0), 0)
    assert (len(none.ids), sum(none.diff_weight), none.diff_count) == (64, 0, 16)


def test_rows_of_a_devices_batch_are_filled_up_alike():
    lengths = [len(example.ids) for example in EXAMPLES]
    data = TrainingSet(
        [(e,) for e in EXAMPLES], CanvasLayout(MASK, END), steps=4, batch=6, seed=0, filling=Filling(7, 2)
    )
    drawn = [len(data[draw].ids) for draw in range(24)]
    assert drawn[::2] == drawn[1::2]
    assert set(drawn) <= set(lengths)
    assert len(set(drawn)) > 1
    (filled,) = fill_up((Example((1, 2, 3, 4), ((1, 2),)),), [(EXAMPLES[1],)], token=7)
    assert filled == Example((1, 2, 3, 4) + (7,) * 8, ((1, 2), (4, 12)))


@pytest.mark.parametrize("stage", ["mdlm", "bd3lm"])
def test_the_small_recipes_run(stage, tmp_path):
    """A few steps from tiny-ar; the result's manifest says how it is to be decoded."""
    values = read_toml(resource("recipes") / f"{stage}.toml")
    tiny_ar = resource("recipes").parent / "checkpoints" / "tiny-ar"
    settings = [f"out={tmp_path / 'out'}", f"model.parent={tiny_ar}", "optim.steps=3", "optim.batch_size=4"]
    settings += [f'data.files=["{rows_file(tmp_path)}"]', "data.held_out=4", "optim.measure_every=3"]
    for setting in settings:
        assign(values, setting)
    record = train_chain(build_chain(values))
    assert {"loss", "l_diff", "accepted"} <= record["final"].keys()
    assert not {"drift", "l_ar"} & record["final"].keys()
    manifest = json.loads((tmp_path / "out" / "fluid.json").read_text())
    assert manifest["method"] == stage
    assert manifest["block_length"] == (16 if stage == "bd3lm" else None)
    assert manifest["shift"] is False
    made = fluid_model.load(str(tmp_path / "out"))
    if stage == "mdlm":  # LLaDA's decoder is MDLM's
        prompt = tuple(made.tokenizer.encode("Q: 7+1? A:"))
        answer = next(fluid_model.engine_for(made, LladaSettings(block_length=8)).generate([Request("x", prompt, 8)]))
        assert len(answer.ids) > 0


def test_a_recipe_becomes_its_layout(tmp_path):
    """dLLM's divisor in its own two stages alone; filling by the batch takes the canvas's random filling away."""
    noise = {"schedule": "cosine", "epsilon": 0.01, "weight": "uniform"}
    tables = {"noise": noise, "blocks": {"length": 8, "shift": True}, "canvas": {"length": 9, "shift": True}}
    expected = {
        "bd3lm": BlockCausalLayout(3, 1, 8, shift=True, noise=NoiseSpec(**noise), divisor_offset=OFFSET),
        "mdlm": CanvasLayout(3, 1, 0, shift=True, noise=NoiseSpec(**noise), divisor_offset=OFFSET),
        "llada": CanvasLayout(3, 1, 9, shift=True, noise=NoiseSpec(**noise)),
    }
    for stage, layout in expected.items():
        if stage != "bd3lm":
            tables["blocks"] = {}
        assert layout_of(recipe_for(tmp_path, "x", stage, Path("parent"), **tables), 3, 1, ()) == layout


def test_block_size_may_grow_and_shrink_in_a_chain(tmp_path):
    """Growing blocks, the whole row, small blocks again: each stage starts from the one before, with its mask token."""
    first = as_table(
        recipe_for(tmp_path, "out", "bd3lm", save_model(tmp_path / "parent"), blocks={"length": 8, "every": 1})
    )
    last = {"stage": "bd3lm", "blocks": {"length": 4, "every": 0}}
    record = train_chain(build_chain({**first, "next": {"stage": "mdlm", "next": last}}))
    made = fluid_model.load(str(tmp_path / "out"))
    assert [stage["recipe"]["stage"] for stage in record["before"]] == ["bd3lm", "mdlm"]
    assert (made.manifest.method, made.manifest.block_length, made.mask_id) == ("bd3lm", 4, MASK)


@pytest.mark.parametrize("stage", ["mdlm", "bd3lm"])
def test_shift_and_lora_reach_the_manifest_and_the_weights(stage, tmp_path):
    folder = save_model(tmp_path / "parent", Qwen3Config(**{**llama_config().to_dict(), "model_type": "qwen3"}))
    before = fluid_model.load(str(folder)).model.state_dict()
    table = {"mdlm": {"canvas": {"shift": True}}, "bd3lm": {"blocks": {"length": 8, "shift": True}}}[stage]
    table["noise"] = {"schedule": "cosine"}
    recipe = recipe_for(tmp_path, "out", stage, folder, lora={"rank": 2, "alpha": 4}, **table)
    train(recipe)
    made = fluid_model.load(str(tmp_path / "out"))
    assert (made.manifest.method, made.manifest.shift) == (stage, True)
    after = made.model.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"]), "an adapter leaves the rest alone"
    measured = set_up_stage(recipe, []).measured_layout.build(EXAMPLES[0], random.Random(0), 0)
    assert sum(weight > 0 for weight in measured.diff_weight) >= 14, "all tokens are masked, and count"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": {"schedule": "poly"}}, "noise.schedule='poly' is unknown; known: linear, cosine"),
        ({"noise": {"epsilon": 0.0}}, "noise.epsilon=0.0 must lie in (0.0, 1.0]"),
        ({"blocks": {"length": 24}}, "blocks.length=24 does not divide data.max_length=64; set 72"),
        ({"blocks": {"length": 8, "by_noise": True}}, "blocks.by_noise=true: stage bd3lm weighs by noise.weight"),
        ({"loss": {"ar": 0.5}}, "loss.ar=0.5: stage bd3lm has no autoregressive term"),
        (
            {"stage": "nbdiff", "noise": {"schedule": "cosine"}},
            "noise: stage nbdiff has none; known: llada, mdlm, bd3lm",
        ),
        ({"stage": "nbdiff", "loss": {"per": "batch"}}, "loss.per='batch': stage nbdiff averages over slots or rows"),
        ({"stage": "mdlm", "blocks": {"shift": True}}, "blocks.shift=true: a setting of stage bd3lm, not of mdlm"),
    ],
)
def test_bad_settings_fail_in_one_line(tmp_path, changes, message):
    valid = as_table(recipe_for(tmp_path, "x", "bd3lm", Path("parent"), blocks={"length": 8}))
    with pytest.raises(ConfigError) as caught:
        build_recipe({**valid, **changes})
    assert message in str(caught.value)


def test_packed_rows_are_not_filled_to_a_batch(tmp_path):
    recipe = recipe_for(tmp_path, "x", "mdlm", Path("parent"))
    packed = {**as_table(recipe), "data": {**as_table(recipe)["data"], "pack": True}}
    with pytest.raises(ConfigError, match=r"data\.pack=true: .*set canvas\.fill='random'"):
        build_recipe(packed)
    assert not build_recipe({**packed, "canvas": {"fill": "random"}}).fills_batch
