"""LLaMA-Factory's training files: what they say, and what they leave to LLaMA-Factory, stands in the recipe."""

from __future__ import annotations

import tomllib

import pytest

from fluid_model import ConfigError
from fluid_model.train.chain import build_chain
from fluid_model.train.cli import main
from fluid_model.train.llamafactory import as_toml, convert, read_yaml
from fluid_model.train.recipe import build_recipe

YAML = """
model_name_or_path: parents/pangu
stage: sft
finetuning_type: lora
lora_rank: 16
lora_alpha: 32
dataset: alpaca_en, mine
dataset_dir: data
cutoff_len: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2e-4
max_steps: 32000
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
output_dir: saves/fluid
k_masks: 16
template: default
"""


def test_a_llama_factory_file_becomes_a_recipe(tmp_path):
    (tmp_path / "train.yaml").write_text(YAML)
    values, unused = convert(read_yaml(tmp_path / "train.yaml"), devices=8)
    assert [line for line in unused if line.startswith("not used")] == ['not used: template: "default"']
    (recipe,) = build_chain(tomllib.loads(as_toml(values, unused)))
    assert (recipe.stage, recipe.out, recipe.model.parent) == ("fluid-hybrid", "saves/fluid", "parents/pangu")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.fans.k_max, recipe.data.max_length) == (16, 32, 16, 1024)
    assert (recipe.optim.batch_size, recipe.optim.accumulate, recipe.optim.steps) == (64, 4, 32000)
    assert (recipe.optim.learning_rate, recipe.optim.warmup, recipe.optim.schedule) == (2e-4, 0.1, "cosine")
    assert (recipe.data.datasets, recipe.data.dataset_info) == (("alpaca_en", "mine"), "data/dataset_info.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage: dpo", "stage=dpo: only sft and pt"),
        ("finetuning_type: freeze", "finetuning_type=freeze: known are lora and full"),
        ("learning_rate: fast", "learning_rate='fast' must be a number"),
        ("lr_scheduler_type: polynomial", "optim.schedule='polynomial' is unknown"),
    ],
)
def test_what_cannot_be_carried_over_is_said(tmp_path, change, message):
    (tmp_path / "train.yaml").write_text(YAML + change + "\n")
    with pytest.raises(ConfigError) as caught:
        convert(read_yaml(tmp_path / "train.yaml"))
    assert message in str(caught.value)


SHORT = """
model_name_or_path: parents/pangu
dataset: mine
output_dir: saves/fluid
"""


def recipe_of(folder, text, devices=1):
    (folder / "train.yaml").write_text(text)
    values, notes = convert(read_yaml(folder / "train.yaml"), devices)
    (recipe,) = build_chain(tomllib.loads(as_toml(values, notes)))
    assert recipe == build_recipe(values), "what is written is what was meant"
    return recipe, notes


def test_what_a_file_leaves_out_is_llama_factorys(tmp_path):
    recipe, notes = recipe_of(tmp_path, SHORT)
    optim = recipe.optim
    assert (optim.steps, optim.epochs, optim.batch_size, optim.learning_rate) == (None, 3.0, 8, 5e-5)
    assert (optim.schedule, optim.warmup, optim.weight_decay, optim.clip, optim.bf16) == (
        "linear",
        0.0,
        0.0,
        1.0,
        False,
    )
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.targets) == (8, 16, 0.0, ())
    assert (recipe.data.max_length, recipe.data.pack, recipe.seed) == (2048, False, 42)
    assert any(note.startswith("val_size is 0: the last 64 rows") for note in notes)
    assert recipe_of(tmp_path, SHORT + "max_steps: -1")[0].optim.epochs == 3.0, "no number of steps"


@pytest.mark.parametrize(
    ("lines", "where", "value"),
    [
        ("dataset: [one, two]", "data.datasets", ("one", "two")),
        ("dataset: one, two", "data.datasets", ("one", "two")),
        ("lora_target: q_proj,v_proj", "lora.targets", ("q_proj", "v_proj")),
        ("lora_target: [o_proj]", "lora.targets", ("o_proj",)),
        ("report_to: [wandb, tensorboard]", "trainer", {"report_to": ["wandb", "tensorboard"]}),
        ("lr_scheduler_kwargs: {num_cycles: 0.4}", "trainer", {"lr_scheduler_kwargs": {"num_cycles": 0.4}}),
        ("val_size: 0.1", "data.held_out", 0.1),
        ("val_size: 200", "data.held_out", 200),
        ("num_train_epochs: 2.5", "optim.epochs", 2.5),
        ("max_steps: 10\nnum_train_epochs: 3.0", "optim.steps", 10),
        ("warmup_steps: 20\nwarmup_ratio: 0.5", "optim.warmup_steps", 20),
        ("warmup_ratio: 0.5", "optim.warmup", 0.5),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.5", "optim.warmup", 0.0),
        ("max_samples: 7", "data.max_rows", 7),
        ("train_on_prompt: true", "data.loss_on", "all"),
        ("mask_history: true", "data.loss_on", "last"),
        ("stage: pt", "data.pack", True),
        ("neat_packing: true", "data.pack", True),
        ("pure_bf16: true", "optim.bf16", True),
        ("mix_strategy: concat\nuse_dora: false\neval_dataset: null", "data.datasets", ("mine",)),
    ],
)
def test_what_a_file_says_is_carried_over(tmp_path, lines, where, value):
    recipe, notes = recipe_of(tmp_path, SHORT.replace("dataset: mine\n", "") + "dataset: mine\n" + lines)
    for name in where.split("."):
        recipe = getattr(recipe, name)
    assert recipe == value
    assert not any(note.startswith("not used") for note in notes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mix_strategy: interleave_over", "mix_strategy='interleave_over' has no counterpart here"),
        ("eval_dataset: other", "eval_dataset='other' has no counterpart"),
        ("use_dora: true", "use_dora=True has no counterpart"),
        ("quantization_bit: 4", "quantization_bit=4 has no counterpart"),
        ("adapter_name_or_path: a", "adapter_name_or_path='a' has no counterpart"),
        ("train_on_prompt: true\nmask_history: true", "exclude one another"),
        ("do_train: false", "do_train=false"),
        ("dataset_dir: ONLINE", "dataset_dir='ONLINE'"),
        ("dataset: [1]", "dataset=[1] must be names"),
        ("lora_target: []", "lora_target names nothing"),
        ("max_steps: 1e3", "max_steps='1e3' must be a whole number"),
        ("val_size: some", "val_size='some' must be a number"),
        ("output_dir: null", "output_dir is missing"),
        ("packing: 3", "data.pack=3 must be true or false"),
        ("num_train_epochs: 0", "optim.epochs=0.0 must be above 0"),
    ],
)
def test_what_changes_the_result_and_cannot_be_honoured_is_refused(tmp_path, line, message):
    with pytest.raises(ConfigError) as caught:
        recipe_of(tmp_path, SHORT + line + "\n")
    assert message in str(caught.value)


def test_notes_are_comments_whatever_the_file_says(tmp_path):
    recipe, notes = recipe_of(tmp_path, SHORT + 'plot_loss: "a\\nseed = 7"\nmax_steps: 3\nnum_train_epochs: 2\n')
    assert recipe.seed == 42
    assert "num_train_epochs: 2 gives way to max_steps, as in the Trainer" in notes


def test_nothing_is_written_before_all_is_checked(tmp_path, capsys):
    file, out = tmp_path / "train.yaml", tmp_path / "recipe.toml"
    file.write_text(SHORT + "use_dora: true\n")
    words = ["import-llamafactory", str(file)]
    assert main(words) == main([*words, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 2
    assert not out.exists()
    file.write_text(SHORT + "plot_loss: true\n")
    assert main([*words, "--out", str(out)]) == 0
    assert "not used: plot_loss: true" in capsys.readouterr().err
    text = out.read_text()
    assert build_recipe(tomllib.loads(text)).out == "saves/fluid"
    out.write_text("mine")
    assert main([*words, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*words, "--out", str(tmp_path / "none" / "x.toml")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "train.yaml"]
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == text
