"""Training: stages that change what they should and nothing else, resume bit for bit, refuse bad input early."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import fluid_model
from fluid_model import ArSettings, ConfigError, FluidSettings, Request
from fluid_model.common.errors import RunError
from fluid_model.train.origin import weights_hash
from fluid_model.train.recipe import as_table, build_recipe
from fluid_model.train.run import StageTrainer, train

from .tiny import save_model


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

    training = train(recipe_for(tmp_path, "fluid", "fluid-horizon", tmp_path / "hybrid", tau=[0.5, 2.8]))
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
    assert written["recipe_hash"] == training["recipe_hash"]
    assert build_recipe(written["recipe"]).hash == training["recipe_hash"]
    assert {"l_ar", "l_diff"} <= json.loads((tmp_path / "hybrid" / "training.json").read_text())["history"][0].keys()


@pytest.mark.parametrize("gated", [False, True])
def test_a_resumed_training_gives_the_weights_of_an_unbroken_one(tmp_path, monkeypatch, gated):
    parent = save_model(tmp_path / "parent")
    changes = {"lora": {"rank": 2, "gated": True}, "fans": {"k_max": 4, "restore": 0.0, "anchors": 3}} if gated else {}
    unbroken, broken = (recipe_for(tmp_path, name, "fluid-hybrid", parent, **changes) for name in ("whole", "broken"))
    train(unbroken)
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
    results = [fluid_model.load(str(tmp_path / name)) for name in ("whole", "broken")]
    a, b = ((result.backbone.adapter or result.model).state_dict() for result in results)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.endswith(".up") for name in a) == gated


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_an_adapter_as_llama_factory_saves_it_is_a_stage_1_result(tmp_path, own_tokenizer):
    """A bare PEFT folder, its mask token one the parent already knows."""
    parent = save_model(tmp_path / "parent")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(parent)
    model.name_or_path = str(parent)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = fluid_model.load(str(parent)).tokenizer
    if own_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    mask = tokenizer.convert_ids_to_tokens(7)
    recipe = recipe_for(tmp_path, "out", "fluid-horizon", tmp_path / "adapter", tau=[1.0])
    train(replace(recipe, model=replace(recipe.model, mask_token=mask)))
    made = fluid_model.load(str(tmp_path / "out"))
    assert (made.mask_id, made.manifest.tau, made.manifest.weights) == (7, (1.0,), "merged")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(made.model(ids).logits, adapted.eval()(ids).logits, atol=1e-5)
    assert fluid_model.load(str(tmp_path / "adapter")).manifest is None, "its files do not tell it from any other LoRA"
    with pytest.raises(ConfigError, match=r"no mask token: none of .*unused32.*<mask>.* set model\.mask_token"):
        train(replace(recipe, out=str(tmp_path / "other")))


@pytest.mark.parametrize("stage", ["nbdiff", "llada", "mdlm", "bd3lm"])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_the_other_methods_train_and_load(tmp_path, stage, lora):
    parent = save_model(tmp_path / "parent")
    shift = stage == "llada" and lora is None
    values = {"lora": lora, "blocks": {"length": 4, "every": 2}, "canvas": {"shift": shift}}
    training = train(recipe_for(tmp_path, "out", stage, parent, **values))
    made = fluid_model.load(str(tmp_path / "out"))
    assert made.manifest.shift == shift
    assert (made.manifest.method, made.manifest.block_length) == (stage, None if stage in ("llada", "mdlm") else 4)
    assert made.manifest.parent == "../parent"
    assert {"l_diff", "accepted"} <= training["final"].keys()
    assert ("drift" in training["final"]) == ("l_ar" in training["final"]) == (stage == "nbdiff")
    with pytest.raises(ConfigError, match="needs a checkpoint of stage fluid-hybrid"):
        train(recipe_for(tmp_path, "x", "fluid-horizon", tmp_path / "out", tau=[1.0]))


def test_a_recipes_hash_names_what_it_says_and_nothing_else():
    """Defaults and the place of the result do not count, so that later settings leave old hashes alone."""
    given = {"stage": "nbdiff", "model": {"parent": "p"}, "data": {"files": ["f"]}, "optim": {"steps": 5}, "seed": 3}
    text = json.dumps({**given, "out": None}, sort_keys=True)
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert build_recipe({**given, "out": "a"}).hash == build_recipe({**given, "out": "b"}).hash == expected
    assert build_recipe({**given, "out": "a", "blocks": {"length": 32}}).hash == expected
    assert build_recipe({**given, "out": "a", "blocks": {"length": 16}}).hash != expected


def test_steps_may_be_taken_in_parts(tmp_path):
    """Two half batches are one whole one where all rows are alike; plain descent would show a wrong scale."""
    parent = save_model(tmp_path / "parent")
    file = tmp_path / "same.jsonl"
    file.write_text('{"prompt": "Q: 7+1? A:", "completion": " 8."}\n' * 20)
    optim = {"steps": 3, "batch_size": 4, "learning_rate": 0.01, "clip": 1e9}
    made = {}
    for parts in (1, 2):
        values = {
            "data": {"files": [str(file)], "held_out": 4, "max_length": 64},
            "optim": {**optim, "accumulate": parts},
        }
        train(recipe_for(tmp_path, f"a{parts}", "ar", parent, **values, loss={"per": "row"}, trainer={"optim": "sgd"}))
        made[parts] = fluid_model.load(str(tmp_path / f"a{parts}")).model.state_dict()
    worst = max(float((made[1][name] - made[2][name]).abs().max()) for name in made[1])
    assert worst < 1e-4


def test_the_manifest_says_how_it_was_made(tmp_path):
    parent = save_model(tmp_path / "parent")
    train(recipe_for(tmp_path, "out", "fluid-hybrid", parent))
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["parent_hash"] == weights_hash(parent)
    assert training["parent_hash"] != weights_hash(tmp_path / "out")
    assert training["data"][0]["sha256"] == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    assert training["seed"] == 1
    assert {"loss", "l_ar", "l_diff", "accepted", "drift"} <= training["final"].keys()
    assert training["final"]["drift"] > 0
    assert not (tmp_path / "out.training").exists()


def test_a_kill_while_saving_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Neither a half-written step nor a half-written result is ever taken for a whole one."""
    parent = save_model(tmp_path / "parent")
    unbroken = recipe_for(tmp_path, "whole", "fluid-hybrid", parent)
    train(unbroken)
    broken = recipe_for(tmp_path, "broken", "fluid-hybrid", parent)
    save = StageTrainer._save_optimizer_and_scheduler

    def full_disk(self, folder):
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(RunError, match="No space left on device; --resume goes on from checkpoint-3"):
        train(broken)
    assert not (tmp_path / "broken").exists()
    monkeypatch.setattr(StageTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(ConfigError, match=r"holds saved steps \(checkpoint-3\): pass --resume"):
        train(broken)
    with pytest.raises(ConfigError, match="holds steps of another recipe"):
        train(recipe_for(tmp_path, "broken", "fluid-hybrid", parent, seed=2), resume=True)
    clock = tmp_path / "broken.training" / "checkpoint-3" / "seconds"
    assert 0 < float(clock.read_text()) < 100
    clock.write_text("1000")
    assert train(broken, resume=True)["seconds"] > 1000, "time before the break counts"
    a, b = (fluid_model.load(str(tmp_path / name)).model.state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_measured_last_is_what_is_saved(tmp_path):
    """Weights saved in bfloat16 are rounded before the final figures are taken."""
    parent = save_model(tmp_path / "parent")
    training = train(recipe_for(tmp_path, "out", "ar", parent, save_dtype="bfloat16"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < (parent / "model.safetensors").stat().st_size * 0.6
    again = recipe_for(tmp_path, "x", "ar", tmp_path / "out", optim={"steps": 1, "learning_rate": 1e-12})
    assert train(again)["final"]["loss"] == pytest.approx(training["final"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stage": "dream"},
            "stage='dream' is unknown; known: ar, fluid-hybrid, fluid-horizon, nbdiff, llada, mdlm, bd3lm",
        ),
        ({"model": {}}, "model: needs either parent or scratch"),
        ({"stage": "fluid-hybrid"}, "model.scratch: stage fluid-hybrid adapts a parent"),
        ({"tau": [1.0]}, "stage fluid-horizon needs some, other stages none"),
        ({"lora": {"rank": 2}}, "lora: stage ar trains no adapter"),
        ({"optim": {"steps": 0}}, "optim.steps=0 must be at least 1"),
        ({"optim": {"steps": 5, "lr": 1.0}}, "optim.lr is no setting; known: optim.steps"),
        ({"data": {"files": []}}, "data.files: must name at least one file"),
        ({"data": {"datasets": ["a"]}}, "data.datasets and data.dataset_info need one another"),
        ({"blocks": {"length": 4, "first": 5}}, "blocks.first=5 must lie in [1, 4]"),
        ({"loss": {"diff": 1.0}}, "loss: stage ar has one term only"),
        ({"loss": {"per": "token"}}, "loss.per='token' is unknown; known: slot, row, batch"),
        ({"fans": {"noise": 1.5}}, "fans.noise=1.5 must lie in [0.0, 1.0]"),
        ({"trainer": 1}, "trainer=1 must be a table"),
        ({"colour": 1}, "colour is no setting; "),
    ],
)
def test_bad_recipes_fail_before_any_data_is_read(tmp_path, changes, message):
    valid = as_table(recipe_for(tmp_path, "x", "ar"))
    with pytest.raises(ConfigError) as caught:
        build_recipe({**valid, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ["{oops", '{"prompt": "x"}', '{"prompt": "x", "completion": ""}', '{"text": 3}'])
def test_a_bad_row_names_file_and_line(tmp_path, line):
    recipe = recipe_for(tmp_path, "x", "ar")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 41: not a training row"):
        train(recipe)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_steps": 3}, "trainer.max_steps is set by the recipe"),
        ({"speed": 3}, "trainer.speed is no argument of transformers' Trainer"),
        ({"optim": "sgd!"}, "trainer: sgd! is not a valid OptimizerNames"),
    ],
)
def test_trainer_arguments_are_checked_before_any_data_is_read(tmp_path, trainer, message):
    recipe = recipe_for(tmp_path, "x", "ar", trainer=trainer)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        train(recipe)
    assert message in str(caught.value)


def test_trainer_arguments_reach_the_trainer(tmp_path):
    parent = save_model(tmp_path / "parent")
    plain = train(recipe_for(tmp_path, "a", "ar", parent))
    other = train(recipe_for(tmp_path, "b", "ar", parent, trainer={"optim": "sgd", "gradient_checkpointing": True}))
    assert plain["final"]["loss"] != other["final"]["loss"]
