"""Where a training writes: what is not its own is never replaced and never removed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fluid_model
from fluid_model import ConfigError
from fluid_model.common.errors import RunError
from fluid_model.train import run
from fluid_model.train.chain import build_chain
from fluid_model.train.cli import main
from fluid_model.train.llamafactory import as_toml
from fluid_model.train.places import check_out, finished, work_folder
from fluid_model.train.recipe import as_table, build_recipe
from fluid_model.train.run import StageTrainer, train, train_chain

from .test_train import recipe_for
from .tiny import save_model


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def short(folder, out, **changes):
    return recipe_for(folder, out, "ar", **{"optim": {"steps": 1, "batch_size": 2}, **changes})


def pretend(recipe, out, **more):
    """A folder such as the recipe's training leaves."""
    out.mkdir(exist_ok=True)
    (out / "training.json").write_text(json.dumps({"recipe_hash": recipe.hash, "final": {}, "seconds": 1.0, **more}))
    (out / "model.safetensors").write_text("weights")


def test_an_out_that_is_taken_is_refused_and_left_alone(tmp_path, capsys):
    recipe = short(tmp_path, "out")
    out = tmp_path / "out"
    file = tmp_path / "recipe.toml"
    values = as_table(recipe)
    file.write_text(as_toml({"stage": values["stage"], "out": values["out"]}, []))
    words = [
        str(file),
        *(f"--set=model.scratch.{k}={v}" for k, v in values["model"]["scratch"].items() if v is not None),
    ]
    words += [f'--set=data.files=["{tmp_path / "rows.jsonl"}"]', "--set=optim.steps=1", "--set=optim.batch_size=2"]
    words = [word.replace("=True", "=true").replace("=False", "=false") for word in words]
    longer = replace(recipe, optim=replace(recipe.optim, steps=100))
    out.mkdir()
    cases = [
        ("holds something else", lambda: (out / "thesis.tex").write_text("years of work")),
        ("holds the result of another recipe", lambda: pretend(longer, out)),
        ("holds something else", lambda: (out / "training.json").write_text("[1")),
    ]
    for message, place in cases:
        place()
        before = tree(tmp_path)
        for more in ([], ["--overwrite"], ["--resume"]):
            assert main([*words, *more]) == 2
            printed = capsys.readouterr().err
            assert message in printed
            assert printed.count("\n") == 1
        assert tree(tmp_path) == before, "nothing written, nothing removed"


def test_a_recipes_own_result_is_replaced_only_when_told(tmp_path):
    recipe, out = short(tmp_path, "out"), tmp_path / "out"
    pretend(recipe, out)
    with pytest.raises(ConfigError, match="holds this recipe's result; pass --overwrite"):
        train(recipe)
    (out / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.md, which was not written here"):
        train(recipe, overwrite=True)
    assert (out / "model.safetensors").read_text() == "weights"
    (out / "notes.md").unlink()
    train(recipe, overwrite=True)
    fluid_model.load(str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_an_empty_folder_is_free_and_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    train(short(tmp_path, "out"))
    assert (tmp_path / "out").is_symlink()
    fluid_model.load(str(tmp_path / "disk"))


def test_what_fills_out_during_a_training_stays(tmp_path, monkeypatch):
    """The result waits in the last saved step."""
    recipe, out = short(tmp_path, "out"), tmp_path / "out"
    real = run._save
    loss = StageTrainer.compute_loss

    def late(self, *arguments, **options):
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("years of work")
        return loss(self, *arguments, **options)

    monkeypatch.setattr(StageTrainer, "compute_loss", late)
    with pytest.raises(RunError, match=r"holds something else.*--resume goes on from checkpoint-1"):
        train(recipe)
    assert tree(out) == {"thesis.tex": b"years of work"}
    monkeypatch.setattr(StageTrainer, "compute_loss", loss)
    out.rename(tmp_path / "thesis")
    assert run._save is real
    train(recipe, resume=True)
    assert finished(recipe)


def test_the_folder_of_steps_is_the_trainings_own(tmp_path):
    recipe = short(tmp_path, "out")
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "slides.odp").write_text("a course")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="where steps are saved, holds something else"):
            train(recipe, resume=resume)
    (work / "slides.odp").unlink()
    assert work_folder(recipe, resume=False) == work
    (work / "checkpoint-3").mkdir()
    (work / "checkpoint-3" / "half.pt").write_text("half a step")
    (work / "runs").mkdir()
    (work / "runs" / "events").write_text("a tracker's log")
    train(recipe)
    assert tree(work) == {"runs/events": b"a tracker's log"}


def test_a_chain_looks_at_all_its_folders_first(tmp_path, monkeypatch):
    parent = save_model(tmp_path / "parent")
    first = recipe_for(tmp_path, "out", "fluid-hybrid", parent, optim={"steps": 1, "batch_size": 2})
    recipes = build_chain({**as_table(first), "next": {"stage": "fluid-horizon", "tau": [1.0]}})
    trained = []
    monkeypatch.setattr(run, "train", lambda recipe, **_: trained.append(recipe.stage) or {"final": {}})
    between = tmp_path / "out.stage-1"
    for taken in (between, tmp_path / "out"):
        taken.mkdir()
        (taken / "thesis.tex").write_text("years of work")
        with pytest.raises(ConfigError, match="holds something else"):
            train_chain(recipes)
        (taken / "thesis.tex").unlink()
    assert trained == []
    pretend(recipes[0], between)
    (between / "notes.md").write_text("mine")
    train_chain(recipes, resume=True)
    assert trained == ["fluid-horizon"]
    assert tree(between) == {"notes.md": b"mine"}, "only the stage's own files go"
    pretend(recipes[1], tmp_path / "out")
    assert train_chain(recipes, resume=True)["recipe_hash"] == recipes[1].hash
    assert trained == ["fluid-horizon"], "a chain that is done is not begun again"


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
def test_out_must_name_a_folder(tmp_path, out):
    with pytest.raises(ConfigError, match="must name a folder"):
        build_recipe({**as_table(short(tmp_path, "x")), "out": out})


def test_epochs_are_counted_when_the_rows_are_known(tmp_path):
    """38 rows, 4 a step, 1.5 times: 15 steps, the same as those 15 asked for."""
    made = {}
    for name, length in (("steps", {"steps": 15}), ("epochs", {"epochs": 1.5})):
        optim = {**length, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 5}
        data = {"files": [str(tmp_path / "rows.jsonl")], "max_length": 64, "held_out": 0.05}
        training = train(recipe_for(tmp_path, name, "ar", data=data, optim=optim))
        assert training["steps"] == 15
        made[name] = fluid_model.load(str(tmp_path / name)).model.state_dict()
    assert all(torch.equal(made["steps"][key], made["epochs"][key]) for key in made["steps"])


def test_a_further_stage_says_its_length_in_its_own_way(tmp_path):
    first = as_table(recipe_for(tmp_path, "x", "ar", optim={"epochs": 2.0, "warmup_steps": 3}))
    first["optim"] = {key: value for key, value in first["optim"].items() if value is not None}
    for optim, kept in (
        ({"steps": 4}, (4, None, 3)),
        ({"epochs": 1.0, "warmup": 0.5}, (None, 1.0, None)),
        ({}, (None, 2.0, 3)),
    ):
        last = build_chain({**first, "next": {"stage": "ar", "optim": optim}})[1].optim
        assert (last.steps, last.epochs, last.warmup_steps) == kept
    with pytest.raises(ConfigError, match="optim: needs either steps or epochs"):
        build_chain({**first, "next": {"stage": "ar", "optim": {"steps": 1, "epochs": 1.0}}})


def test_checking_out_asks_nothing_of_a_free_place(tmp_path):
    check_out(short(tmp_path, "nowhere"))
