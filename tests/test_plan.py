"""Dry runs and recipe files: what they promise is counted, and every recipe kept here holds."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ConfigError
from fluid_model.common.fields import assign
from fluid_model.common.files import Nested, read_toml
from fluid_model.train.chain import build_chain
from fluid_model.train.cli import main
from fluid_model.train.parent import llama_config as scratch_config
from fluid_model.train.parent import outline
from fluid_model.train.plan import describe_costs, estimate_cost
from fluid_model.train.recipe import build_recipe
from fluid_model.train.run import train_chain

from .test_train import recipe_for, rows_file
from .tiny import byte_tokenizer, llama_config, save_model

RECIPES = sorted(resource("recipes").glob("*.toml"))


def changed(file, *settings: str) -> Nested:
    values = read_toml(file)
    for setting in settings:
        assign(values, setting)
    return values


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_passes_a_dry_run(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not file.stem.endswith("7b") and not file.stem.endswith("-ar"):
        save_model(tmp_path / "parent")
        arguments = [str(file), "--dry-run", "--set", f"model.parent={tmp_path / 'parent'}"]
    else:
        arguments = [str(file), "--dry-run"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    for word in ("parameters", "tokens", "FLOPs", "memory", "time here", "8 x h100"):
        assert word in output
    assert all(len(line) <= 80 for line in output.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fluid-7b", "nbdiff-7b"])
def test_the_7b_recipes_run_on_two_layers_of_the_same_architecture(name, tmp_path):
    file = resource("recipes") / f"{name}.toml"
    shape = build_recipe({k: v for k, v in read_toml(file).items() if k != "next"}).model.shape
    config = scratch_config(shape)
    config.update({"vocab_size": 300, "hidden_size": 64, "intermediate_size": 200, "num_hidden_layers": 2})
    config.update({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "dtype": "float32"})
    config.update({"bos_token_id": 0, "eos_token_id": 1})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, LlamaForCausalLM)
    assert model.model.layers[0].self_attn.o_proj.bias is not None
    model.save_pretrained(tmp_path / "parent")
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    settings = [f"out={tmp_path / 'out'}", f"model.parent={tmp_path / 'parent'}", "optim.steps=2", "data.held_out=4"]
    settings += [f'data.files=["{rows_file(tmp_path)}"]', "optim.batch_size=8", "optim.accumulate=2"]
    settings += ["data.max_length=256"]  # packs of 8192 tokens would be the same text many times over
    if name == "fluid-7b":
        settings += ["next.optim.steps=2", "next.optim.batch_size=8"]
    record = train_chain(build_chain(changed(file, *settings)))
    made = fluid_model.load(str(tmp_path / "out"))
    assert made.manifest.method == name.removesuffix("-7b")
    assert len(record["before"]) == (name == "fluid-7b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parent", "rows.jsonl"]


def test_what_the_7b_plan_counts():
    """7.8B parameters, 2.6B tokens (the paper says 2.7B), LoRA of rank 16 on all linear layers."""
    stage_1, stage_2 = build_chain(read_toml(resource("recipes") / "fluid-7b.toml"))
    cost = estimate_cost(stage_1, stage_1.model)
    assert cost.parameters == pytest.approx(8.05e9, rel=0.05)
    assert cost.tokens == pytest.approx(32000 * 80 * 1024, rel=0.01)
    assert cost.trained == pytest.approx(0.005 * cost.parameters, rel=0.5)
    response = 0.75 * cost.tokens
    assert (cost.slots - cost.tokens) / response == pytest.approx(4.25, abs=0.2), "slots a response token (FACTS)"
    heads = estimate_cost(stage_2, stage_1.model)
    assert heads.trained == 5 * (4096 * 1024 + 1024 + 1024 * 16 + 16)
    assert heads.flops < cost.flops / 20


@pytest.mark.slow
def test_a_plan_counts_the_models_own_products(tmp_path):
    """Forward FLOPs of the plan against torch's own counter on the same rows."""
    from torch.utils.flop_counter import FlopCounterMode

    parent = save_model(tmp_path / "parent")
    data = {"files": [str(rows_file(tmp_path, 12))], "max_length": 64, "held_out": 4}
    recipe = recipe_for(tmp_path, "out", "ar", parent, data=data, optim={"steps": 1, "batch_size": 4})
    model = outline(recipe.model)
    assert all(p.is_meta for p in model.parameters())
    cost = estimate_cost(recipe, recipe.model)
    from fluid_model.train.data import TrainingSet, encode
    from fluid_model.train.row_layouts import CausalLayout
    from fluid_model.train.rows import load_rows
    from fluid_model.train.stages import collate, row_loss

    checkpoint = fluid_model.load(str(parent))
    examples = encode(checkpoint.tokenizer, load_rows(recipe.data)[0], 64)
    rows = TrainingSet([(example,) for example in examples], CausalLayout(), steps=1, batch=len(examples), seed=0)
    counter = FlopCounterMode(display=False)
    checkpoint.model.set_attn_implementation("eager")
    with counter:
        for i in range(len(rows)):
            row_loss(checkpoint.model, checkpoint.model, collate([rows[i]]), (1.0, 0.0))[0].backward()
    per_row = counter.get_total_flops() / len(rows)
    assert cost.flops / 4 == pytest.approx(per_row, rel=0.02)


@pytest.mark.slow
def test_a_gated_training_passes_back_through_its_masks_alone(tmp_path):
    """The plan of a gated stage against torch's counter on one of its rows, attention aside."""
    from torch.utils.flop_counter import FlopCounterMode

    from fluid_model.train.data import TrainingSet, encode
    from fluid_model.train.rows import load_rows
    from fluid_model.train.stage_setup import set_up_stage
    from fluid_model.train.stages import collate

    parent = save_model(tmp_path / "parent", llama_config(hidden_size=64, intermediate_size=256))
    data = {"files": [str(rows_file(tmp_path, 12))], "max_length": 64, "held_out": 4}
    gated = {"lora": {"rank": 1, "gated": True}, "fans": {"k_max": 4, "restore": 0.0, "anchors": 4}, "data": data}
    recipe = recipe_for(tmp_path, "out", "fluid-hybrid", parent, optim={"steps": 1, "batch_size": 8}, **gated)
    setup = set_up_stage(recipe, [])
    examples = encode(setup.checkpoint.tokenizer, load_rows(recipe.data)[0], 64)
    rows = TrainingSet([(example,) for example in examples], setup.layout, steps=1, batch=len(examples), seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        for i in range(len(rows)):
            setup.module(**collate([rows[i]]))["loss"].backward()
    per_row = counter.get_total_flops() / len(rows)
    assert estimate_cost(recipe, recipe.model).flops / 8 == pytest.approx(per_row, rel=0.1)


def test_an_unknown_gpu_is_said(tmp_path):
    with pytest.raises(ConfigError, match="--gpu abacus: known are a100, h100"):
        describe_costs([recipe_for(tmp_path, "x", "ar")], "abacus")


def test_a_chain_says_only_what_changes(tmp_path):
    parent = save_model(tmp_path / "parent")
    first = recipe_for(tmp_path, "out", "fluid-hybrid", parent, lora={"rank": 2})
    from fluid_model.train.recipe import as_table

    values = {**as_table(first), "next": {"stage": "fluid-horizon", "tau": [1.0, 2.0], "optim": {"steps": 2}}}
    one, two = build_chain(values)
    assert one.out == two.model.parent == str(tmp_path / "out.stage-1")
    assert (one.lora.rank, two.lora, two.optim.steps, two.optim.batch_size) == (2, None, 2, 4)
    with pytest.raises(ConfigError, match=r"next\.optim\.steps=0 must be at least 1"):
        build_chain({**values, "next": {**values["next"], "optim": {"steps": 0}}})
    with pytest.raises(ConfigError, match=r"next\.colour is no setting"):
        build_chain({**values, "next": {**values["next"], "colour": 1}})
    record = train_chain([one, two])
    assert [stage["recipe"]["stage"] for stage in record["before"]] == ["fluid-hybrid"]
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["before"][0]["final"] == record["before"][0]["final"]
    assert fluid_model.load(str(tmp_path / "out")).manifest.parent == "../parent"
    assert not (tmp_path / "out.stage-1").exists()


def test_a_resumed_chain_leaves_finished_stages_alone(tmp_path, monkeypatch):
    parent = save_model(tmp_path / "parent")
    from fluid_model.train import run
    from fluid_model.train.recipe import as_table

    values = {**as_table(recipe_for(tmp_path, "out", "fluid-hybrid", parent)), "next": {"stage": "fluid-horizon"}}
    values["next"]["tau"] = [1.0]
    recipes = build_chain(values)
    run.train(recipes[0])
    trained = []
    real = run.train
    monkeypatch.setattr(run, "train", lambda recipe, **more: trained.append(recipe.stage) or real(recipe, **more))
    run.train_chain(recipes, resume=True)
    assert trained == ["fluid-horizon"]
