"""Gated adapters: the parent's own text by construction, the same numbers in training, decoding and PEFT's files."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import fluid_model
from fluid_eval.analysis.losslessness import in_float64
from fluid_model import ArSettings, ConfigError, FluidSettings, Request
from fluid_model.checkpoints.weights import fingerprint
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.gated_lora import GatedLora
from fluid_model.forward.kv_cache import KVCache
from fluid_model.train.gated import GatedStage, block_slots
from fluid_model.train.row_layouts import AllMaskLayout, Example, HybridLayout, pack_rows
from fluid_model.train.run import train
from fluid_model.train.stages import HorizonCalibration, collate, slot_logits

from .test_train import recipe_for
from .tiny import MASK, fluid_checkpoint, llama_config, save_model

GATED = {"rank": 2, "alpha": 4, "gated": True}
FANS = {"k_max": 4, "restore": 0.0, "anchors": 3}


def gated_checkpoint(targets=(), seed=0, vocabulary=258, window=256):
    """A random FLUID checkpoint with a random gated adapter, far from zero, and its parent's weights."""
    config = llama_config(vocab_size=vocabulary, max_position_embeddings=window)
    parent = fluid_checkpoint(seed, config=config)
    adapter = GatedLora(parent.model, parent.mask_id, rank=3, alpha=6, targets=targets)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    manifest = replace(parent.manifest, weights="adapter", gated=True, parent_hash=fingerprint(parent.model))
    backbone = Backbone(parent.model, adapter.requires_grad_(False))
    return replace(parent, backbone=backbone, manifest=manifest), parent


def merged_twin(checkpoint):
    """The model with the adapter in the weights of every slot, as plain LoRA would have it."""
    model, adapter = copy.deepcopy(checkpoint.model), checkpoint.backbone.adapter
    with torch.no_grad():
        for number, layer in enumerate(model.base_model.layers):
            for path in (f"{part}.{name}" for part in ("self_attn", "mlp") for name in adapter.layers[number]):
                if hasattr(layer.get_submodule(path.partition(".")[0]), path.rpartition(".")[2]):
                    pair = adapter.layers[number][path.rpartition(".")[2]]
                    layer.get_submodule(path).weight += adapter.scale * pair.up @ pair.down
        model.get_input_embeddings().weight[checkpoint.mask_id] = adapter.mask_embedding
    return model


def masked_logits(checkpoint, tokens, masks):
    """Logits of a forward of tokens and masks behind them in one row, and of the same tokens alone."""
    ids = torch.tensor([[*tokens, *[checkpoint.mask_id] * masks]])
    backbone = checkpoint.backbone
    cache = KVCache(1, ids.shape[1])
    plan = cache.set_write_positions(0, [0], ids.shape[1], ids.device)
    return backbone.logits(backbone.forward(ids, plan, cache))[0]


@pytest.mark.parametrize("forward", ["compiled", "explicit"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("up_proj",)])
def test_tokens_are_the_parents_and_masks_the_merged_models(targets, forward):
    checkpoint, parent = gated_checkpoint(targets)
    if forward == "explicit":
        checkpoint.backbone.compiled = None
    elif checkpoint.backbone.compiled is None:
        pytest.skip("no C compiler")
    tokens = [7, 30, 12, 99, 3]
    logits = masked_logits(checkpoint, tokens, 3)
    with torch.no_grad():
        own = parent.model(torch.tensor([tokens])).logits[0]
        assert torch.allclose(logits[:5], own, atol=1e-4)
        # keys and values of the tokens come from the parent, all else of the mask slots from the merged weights
        past = parent.model(torch.tensor([tokens]), use_cache=True).past_key_values
        twin = merged_twin(checkpoint)
        masks = torch.full((1, 3), checkpoint.mask_id)
        expected = twin(masks, past_key_values=past, use_cache=True).logits[0]
    assert torch.allclose(logits[5:], expected, atol=1e-3)
    assert not torch.allclose(logits[5:], masked_logits(parent, tokens, 3)[5:], atol=1e-2), "the adapter acts"


@pytest.mark.parametrize("slot_budget", [4, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_verified_text_is_the_parents_whatever_the_adapter_has_learnt(slot_budget, batch_size):
    for seed in range(3):
        checkpoint, parent = gated_checkpoint(seed=seed)
        requests = [Request(str(n), tuple(range(5 + n, 12 + 2 * n)), 24) for n in range(5)]
        settings = FluidSettings(slot_budget=slot_budget)
        drafted = {g.key: g for g in fluid_model.engine_for(checkpoint, settings, batch_size).generate(requests)}
        plain = {g.key: g.ids for g in fluid_model.engine_for(parent, ArSettings()).generate(requests)}
        assert {key: g.ids for key, g in drafted.items()} == plain


@pytest.mark.parametrize("forward", ["compiled", "explicit"])
def test_a_changed_adapter_is_followed(forward):
    checkpoint, _ = gated_checkpoint()
    if forward == "explicit":
        checkpoint.backbone.compiled = None
    before = masked_logits(checkpoint, [7, 30], 2)
    assert torch.equal(before, masked_logits(checkpoint, [7, 30], 2))
    with torch.no_grad():
        checkpoint.backbone.adapter.maps(0)["q_proj"].up.mul_(2.0)
    assert not torch.equal(before[2:], masked_logits(checkpoint, [7, 30], 2)[2:])


def test_the_audits_float64_copy_keeps_the_adapter():
    checkpoint, _ = gated_checkpoint()
    logits = masked_logits(checkpoint, [7, 30, 12], 3)
    wide = in_float64(checkpoint)
    assert wide.backbone.dtype == torch.float64
    assert torch.allclose(masked_logits(wide, [7, 30, 12], 3), logits, atol=1e-3)


def test_save_then_load_changes_nothing(tmp_path):
    save_model(tmp_path / "parent")
    child = trained(tmp_path)
    again = fluid_model.load(str(child))
    again.manifest = replace(again.manifest, parent="../parent")
    fluid_model.save(again, tmp_path / "copy")
    loaded = fluid_model.load(str(tmp_path / "copy"))
    assert loaded.manifest == again.manifest
    for name, weight in again.backbone.adapter.state_dict().items():
        assert torch.equal(weight, loaded.backbone.adapter.state_dict()[name]), name
    tokens = [7, 30, 12]
    assert torch.equal(masked_logits(again, tokens, 2), masked_logits(loaded, tokens, 2))


def test_peft_reads_the_same_matrices(tmp_path):
    """PEFT knows no gate: over a row of masks alone, its forward is ours."""
    checkpoint, parent = gated_checkpoint()
    fluid_model.save(checkpoint, tmp_path / "gated")
    with pytest.warns(UserWarning, match="gated_by"):
        plain = PeftModel.from_pretrained(copy.deepcopy(parent.model), str(tmp_path / "gated" / "adapter"))
    ids = torch.full((1, 4), checkpoint.mask_id)
    with torch.no_grad():
        plain.get_input_embeddings().weight[checkpoint.mask_id] = checkpoint.backbone.adapter.mask_embedding
        assert torch.allclose(plain(ids).logits[0], masked_logits(checkpoint, [], 4), atol=1e-3)


def trained(folder, out="gated", **changes):
    values = {"lora": GATED, "fans": FANS, "loss": {"target": "parent"}, **changes}
    train(recipe_for(folder, out, "fluid-hybrid", folder / "parent", **values))
    return folder / out


def test_held_out_rows_are_measured_with_the_weights_of_their_step(tmp_path):
    """The fused optimizer changes weights without a version of its own; what was made of earlier ones must not stay."""
    save_model(tmp_path / "parent")
    optim = {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "measure_every": 2}
    values = {"lora": GATED, "fans": FANS, "loss": {"target": "parent"}, "optim": optim, "save_dtype": "bfloat16"}
    record = train(recipe_for(tmp_path, "gated", "fluid-hybrid", tmp_path / "parent", **values))
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[2] == pytest.approx(losses[3], rel=0.02), "of the last step, before and after rounding"


@pytest.mark.parametrize("target", ["parent", "labels"])
def test_a_training_changes_the_adapter_alone(tmp_path, target):
    """Stages 1 and 2 over a parent: drift 0, drafts that learn, K-heads, the parent's text."""
    save_model(tmp_path / "parent")
    values = {"lora": GATED, "fans": FANS, "loss": {"target": target}}
    record = train(recipe_for(tmp_path, "gated", "fluid-hybrid", tmp_path / "parent", **values))
    assert abs(record["final"]["drift"]) < 1e-3
    losses = [entry["l_diff"] for entry in record["history"] if "l_diff" in entry]
    assert losses[-1] < losses[0]
    calibration = recipe_for(tmp_path, "fluid", "fluid-horizon", tmp_path / "gated", tau=[2.8], fans={"k_max": 4})
    train(calibration)
    child, parent = fluid_model.load(str(tmp_path / "fluid")), fluid_model.load(str(tmp_path / "parent"))
    assert (child.manifest.gated, child.manifest.tau) == (True, (2.8,))
    requests = [Request("0", tuple(range(5, 12)), 24)]
    (drafted,) = fluid_model.engine_for(child, FluidSettings(slot_budget=64)).generate(requests)
    (plain,) = fluid_model.engine_for(parent, ArSettings()).generate(requests)
    assert drafted.ids == plain.ids


def packed_batch(checkpoint, anchors=3, **widths):
    layout = AllMaskLayout(checkpoint.mask_id, 4, anchors=anchors, **widths)
    examples = [Example(tuple(range(5, 17)), ((4, 12),)), Example(tuple(range(40, 50)), ((2, 10),))]
    rows = [layout.build(example, random.Random(n), 0) for n, example in enumerate(examples)]
    return collate([pack_rows(rows), rows[0]])


@pytest.mark.parametrize("widths", [{"anchors": 3}, {"anchors": 7, "drawn": True, "depth": 0.6}])
def test_training_sees_what_decoding_sees(widths):
    """Hidden states of the split forward are those of the engine's forward, at every mask slot of packed rows."""
    checkpoint, _ = gated_checkpoint()
    batch = packed_batch(checkpoint, **widths)
    stage = GatedStage(checkpoint.backbone)
    masks = batch["step"] > 0
    logits = slot_logits(stage, checkpoint.model, batch, masks)
    starts = {0: 0, 1: 12}  # first slot of a segment in the packed row: tokens stand first in their example
    starts[1] = int((batch["segment"][0] == 1).nonzero()[0])
    for (row, slot), ours in zip(masks.nonzero().tolist(), logits, strict=True):
        start = starts[int(batch["segment"][row, slot])]
        anchor, step = int(batch["anchor"][row, slot]), int(batch["step"][row, slot])
        tokens = batch["ids"][row, start : anchor + 1].tolist()
        assert torch.allclose(ours, masked_logits(checkpoint, tokens, step)[-1], atol=1e-3)


def test_the_parents_distribution_is_the_target():
    """The divergence at a mask slot is from the parent's distribution at the token in its place."""
    checkpoint, parent = gated_checkpoint()
    batch = packed_batch(checkpoint)
    stage = GatedStage(checkpoint.backbone, "parent")
    loss = stage(**batch)["loss"]
    labelled = batch["step"] > 0
    ours = slot_logits(stage, checkpoint.model, batch, labelled).log_softmax(-1)
    expected = []
    for row, slot in labelled.nonzero().tolist():
        segment = batch["segment"][row, slot]
        start = int((batch["segment"][row] == segment).nonzero()[0])
        place = int(batch["anchor"][row, slot] + batch["step"][row, slot])
        tokens = batch["ids"][row, start : place + 1]
        with torch.no_grad():
            expected.append(parent.model(tokens[None]).logits[0, -1].log_softmax(-1))
    divergence = torch.nn.functional.kl_div(ours, torch.stack(expected), log_target=True, reduction="none").sum(-1)
    assert torch.isclose(loss, divergence.mean(), rtol=1e-3)
    assert float(loss) > 0.1


def test_gradients_reach_every_parameter_and_no_weight_of_the_parent():
    checkpoint, _ = gated_checkpoint()
    checkpoint.backbone.adapter.requires_grad_(True)
    stage = GatedStage(checkpoint.backbone, "parent")
    stage(**packed_batch(checkpoint))["loss"].backward()
    assert all(float(p.grad.abs().max()) > 0 for p in stage.parameters())
    assert all(p.grad is None for p in checkpoint.model.parameters())


def test_horizons_are_calibrated_on_the_adapters_losses():
    """Stage 2 sees the losses of the gated forward, and the parent's hidden states at the anchors."""
    checkpoint, _ = gated_checkpoint()
    batch, stage = packed_batch(checkpoint), GatedStage(checkpoint.backbone)
    blocks = HorizonCalibration(checkpoint.model, 4, [2.8], stage).block_losses(batch)
    masks = batch["step"] > 0
    logits = slot_logits(stage, checkpoint.model, batch, masks)
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"][masks], reduction="none")
    assert torch.allclose(blocks.losses.sum(), losses.sum(), rtol=1e-4)
    plain = HorizonCalibration(checkpoint.model, 4, [2.8]).block_losses(batch)
    assert torch.allclose(plain.hidden, blocks.hidden, atol=1e-3)
    assert not torch.allclose(plain.losses, blocks.losses, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_is_saved_in_the_number_format_asked_for(tmp_path, dtype):
    save_model(tmp_path / "parent")
    child = trained(tmp_path, save_dtype=dtype)
    tensors = load_file(child / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert fluid_model.load(str(child)).backbone.adapter.mask_embedding.dtype == torch.float32


@pytest.mark.parametrize("layout", [AllMaskLayout, HybridLayout])
def test_so_many_anchors_and_weights_that_fall_with_depth(layout):
    extra = (range(2, 5),) if layout is HybridLayout else ()
    example, widths = Example(tuple(range(100, 140)), ((10, 40),)), set()
    for seed in range(8):
        row = layout(1, 4, *extra, anchors=6, depth=0.5).build(example, random.Random(seed), 0)
        slots = [n for n, step in enumerate(row.step) if step]
        assert len({row.anchor[n] for n in slots}) == 6
        assert all(row.diff_weight[n] == 0.5 ** (row.step[n] - 1) for n in slots)
        assert row.diff_count == pytest.approx(sum(row.diff_weight))
        widths |= {row.step[n] for n in slots}
    assert widths == {1, 2, 3, 4}


def test_drawn_widths_weigh_a_depth_as_falling_weights_do():
    """A slot of depth n is there as often as its weight would be, and weighs 1."""
    example, depths = Example(tuple(range(100, 160)), ((10, 60),)), torch.zeros(4)
    layout = AllMaskLayout(1, 4, anchors=20, depth=0.6, drawn=True)
    for seed in range(200):
        row = layout.build(example, random.Random(seed), 0)
        steps = [step for step in row.step if step]
        assert {weight for weight, step in zip(row.diff_weight, row.step, strict=True) if step} == {1.0}
        assert row.diff_count == len(steps)
        for step in steps:
            depths[step - 1] += 1
    assert (depths / depths[0]).tolist() == pytest.approx([1, 0.6, 0.36, 0.216], abs=0.03)


def test_blocks_of_unequal_width_share_rows():
    anchor = torch.tensor([0, 1, 2, 3, 0, 0, 1, 0, 2, 2, 3])
    step = torch.tensor([0, 0, 0, 0, 1, 2, 1, 3, 1, 2, 1])
    slots, valid = block_slots(anchor, step)
    assert slots.tolist() == [[4, 5, 7], [8, 9, 6], [10, 10, 10]]
    assert valid.tolist() == [[True, True, True], [True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fans": {"k_max": 4}}, "fans.restore=1.0: a gated adapter learns from masks alone"),
        ({"loss": {"ar": 1.0}}, "loss.ar=1.0"),
        ({"lora": {**GATED, "dropout": 0.1}}, "neither dropout"),
        ({"lora": None}, "loss.target='parent' needs lora.gated=true"),
    ],
)
def test_recipes_that_gate_nothing(tmp_path, changes, message):
    save_model(tmp_path / "parent")
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        trained(tmp_path, **changes)


def test_what_is_wrong_with_a_gated_folder_is_named(tmp_path):
    save_model(tmp_path / "parent")
    child = trained(tmp_path)
    with pytest.raises(ConfigError, match=r"a gated adapter, for mask slots alone; open the folder of its fluid\.json"):
        fluid_model.load(str(child / "adapter"), base=str(tmp_path / "parent"))
    save_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"an adapter over weights \w{12}, and .* has \w{12}"):
        fluid_model.load(str(child), base=str(tmp_path / "other"))
    config = child / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(ConfigError, match="a plain LoRA"):
        fluid_model.load(str(child))


def test_a_fingerprint_tells_weights_apart_and_not_their_number_format():
    one, other = fluid_checkpoint(0).model, fluid_checkpoint(1).model
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one).bfloat16())
    assert MASK in fluid_checkpoint().tokenizer.get_vocab()
