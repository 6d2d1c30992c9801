"""lm-eval's own command with `--model fluid-eval`: the scores and forwards of our own run, in its results file."""

from __future__ import annotations

import json
import sys
import tomllib
from functools import partial
from importlib import import_module

import pytest

import fluid_eval
from fluid_eval.common.paths import resource
from fluid_eval.running import lm_eval_backend
from fluid_eval.running.lm_eval_backend import LmEvalBackend, main
from fluid_model import ConfigError

TINY = str(resource("checkpoints") / "tiny-fluid")
SETTINGS = {"decoder": "fluid", "confidence": 0.8, "slot_budget": 64, "batch_size": "auto"}
FOLDER = resource("tasks") / "mini"


@pytest.fixture
def lm_eval(monkeypatch):
    """lm-eval's command, in this process. Its own tasks are not indexed, which takes longer than all else."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
        main()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mini_gsm8k_1", "mini_mmlu_1"])
def test_lm_evals_command_scores_and_counts_as_our_run(task, lm_eval, tmp_path, capsys):
    arguments = ",".join(f"{name}={value}" for name, value in SETTINGS.items() if name != "batch_size")
    lm_eval(
        "--model", "fluid-eval", "--model_args", f"pretrained={TINY},{arguments}", "--tasks", task, "--limit", "4",
        "--batch_size", "auto", "--include_path", str(FOLDER), "--output_path", str(tmp_path / "theirs"),
    )  # fmt: skip
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())
    ours = fluid_eval.run(
        tasks=task, model=TINY, limit=4, out=tmp_path / "ours", **{"decoder.name": "fluid"},
        **{f"decoder.{name}": SETTINGS[name] for name in ("confidence", "slot_budget")},
    )  # fmt: skip
    for row in ours.rows:
        assert theirs["results"][task][f"{row.metric},{row.filter}"] == row.score
    cost = theirs["config"]["fluid_eval"]
    assert cost["decoder"]["confidence"] == 0.8
    for name in ("tokens", "forwards", "slots", "tokens_per_forward"):
        assert cost[name] == cost["by_task"][task][name] == getattr(ours.rows[0].cost, name), name
    if task == "mini_gsm8k_1":
        assert cost["tokens_per_forward"] > 1, "it drafts"
    assert "tiny-fluid: decoder fluid" in capsys.readouterr().err


def test_arguments_are_settings():
    lm = LmEvalBackend(TINY, device="cuda:0", batch_size="1", dtype="float32", seed=5, decoder="fluid", verify=False)
    spec = lm._run.spec
    assert (spec.model.path, spec.model.device, spec.model.dtype) == (TINY, "auto", "float32")
    assert (spec.batch_size, spec.seed, spec.decoder.name, spec.decoder.verify) == (1, 5, "fluid", False)
    assert LmEvalBackend(TINY, **{"decoder.confidence": 0.7})._run.spec.decoder.confidence == 0.7
    with pytest.raises(ConfigError, match=r"confidnce is no setting of decoder 'fluid'; did you mean decoder.con"):
        LmEvalBackend(TINY, confidnce=0.7)
    with pytest.raises(ConfigError, match=r"decoder=llada: .* was adapted to fluid; use --decoder fluid"):
        LmEvalBackend(TINY, decoder="llada")


def test_whole_texts_and_chats_are_answered(tiny_model):
    from lm_eval.api.instance import Instance

    lm = LmEvalBackend(str(tiny_model), decoder="ar")
    rolling = Instance("loglikelihood_rolling", {}, ("a text of some length",), 0, metadata=("t", 0, 1))
    (total,) = lm.loglikelihood_rolling([rolling])
    pair = Instance("loglikelihood", {}, ("", "a text of some length"), 0, metadata=("t", 1, 1))
    assert total == pytest.approx(lm.loglikelihood([pair])[0][0], abs=1e-4)
    with pytest.raises(ConfigError, match="chat"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])  # this tokenizer has no template
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    prompt = lm.apply_chat_template([{"role": "user", "content": "x"}])
    assert prompt == "<user>x<assistant>"
    greedy = Instance("generate_until", {}, (prompt, {"until": ["."], "max_gen_toks": 4}), 0, metadata=("u", 0, 1))
    assert lm.generate_until([greedy]) == [lm._run.samples["u/0"]["output"]]
    assert lm.get_model_info()["fluid_eval"]["by_task"]["u"]["tokens"] <= 4
    sampled = Instance("generate_until", {}, (prompt, {"do_sample": True, "temperature": 0.7}), 0, metadata=("u", 1, 1))
    with pytest.raises(ConfigError, match="here the decoder decides"):
        lm.generate_until([sampled])


def test_the_entry_point_names_the_backend():
    project = tomllib.loads((resource("checkpoints").parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"][lm_eval_backend.NAME].partition(":")
    assert getattr(import_module(module), name) is LmEvalBackend
