"""The cost of an adaptation: the right stages for each method, each compared with the one before."""

from __future__ import annotations

import json

import pytest

from fluid_eval.analysis.adaptation_cost import plan_stages
from fluid_eval.cli import EXIT_CONFIG, EXIT_UNHEALTHY
from fluid_eval.cli.main import main
from fluid_model.common.errors import ConfigError

VALUES = {"tasks": ["gsm8k"], "model": {"path": "m", "dtype": "float32"}}


def made_of(method, **changes):
    """Each step's name, model and decoder."""
    steps, plan = plan_stages({**VALUES, **changes}, "p", method)
    specs = [point.spec for point in plan.points]
    return [(s.name, spec.model.path, spec.decoder.name) for s, spec in zip(steps, specs, strict=True)], specs


def test_each_method_has_its_steps():
    """LLaDA's weights do not write token by token, and only FLUID checks its drafts."""
    fluid, specs = made_of("fluid")
    assert fluid == [
        ("parent, AR", "p", "ar"), ("adaptation", "m", "ar"),
        ("verified parallel decoding", "m", "fluid"), ("dropping verification", "m", "fluid"),
    ]  # fmt: skip
    assert [spec.decoder.verify for spec in specs[2:]] == [True, False]
    assert made_of("nbdiff")[0][1:] == [("adaptation", "m", "ar"), ("block diffusion", "m", "nbdiff")]
    assert made_of("llada")[0][1:] == [("adaptation, diffusion", "m", "llada")]


def test_the_parent_shares_what_is_not_the_adapted_models_own():
    model = {**VALUES["model"], "tau": 2.8, "mask_token": "<m>"}
    decoder = {"confidence": 0.5, "temperature": 0.7}
    _, (parent, adapted, checked, unchecked) = made_of("fluid", model=model, decoder=decoder)
    assert (parent.model.dtype, parent.model.tau, parent.model.mask_token) == ("float32", None, None)
    assert (adapted.model.mask_token, checked.model.tau, unchecked.model.tau) == ("<m>", 2.8, 2.8)
    assert {spec.decoder.temperature for spec in (parent, adapted, checked, unchecked)} == {0.7}
    assert {spec.decoder.confidence for spec in (checked, unchecked)} == {0.5}


def test_what_has_no_tax_is_refused():
    for method, values, message in (
        (None, {}, "m is a plain causal model; name an adapted model"),
        ("fluid", {"decoder": "ar"}, "m was adapted to fluid; .* no decoder but its own"),
        ("fluid", {"model": "p"}, "p is its own parent"),
    ):
        with pytest.raises(ConfigError, match=message):
            made_of(method, **values)


def test_the_command(tiny_model, tiny_fluid, tmp_path, capsys):
    """On random weights: their parent is another model, and checked drafts are what AR writes."""
    words = ["tax", "--model", str(tiny_fluid), "--tasks", "mini_gsm8k_1,mini_mmlu_1", "--limit", "3"]
    words += ["--max-new-tokens", "6", "--out", str(tmp_path / "t")]
    assert main(words) == EXIT_CONFIG
    assert "name the model it was adapted from: --parent" in capsys.readouterr().err
    assert main([*words, "--parent", str(tiny_fluid)]) == EXIT_CONFIG
    assert "was itself adapted to fluid; name the AR model before that" in capsys.readouterr().err
    words += ["--parent", str(tiny_model)]
    assert main([*words, "--json"]) == EXIT_UNHEALTHY, "every answer is at its limit"
    result = json.loads(capsys.readouterr().out)
    adaptation, checked, unchecked = result["steps"]
    assert [step["step"] for step in result["steps"]] == result["names"][1:]
    assert (checked["base"], unchecked["base"]) == (adaptation["other"], checked["other"])
    assert (checked["all"]["difference"]["mean"], checked["all"]["b"], checked["all"]["c"]) == (0, 0, 0)
    assert checked["all"]["n"] == 6
    assert checked["speed"]["tokens_per_forward"]["ratio"] > 0
    assert {pair["base"] for pair in result["against_parent"]} == {adaptation["base"]}
    assert main([*words, "--resume"]) == EXIT_UNHEALTHY
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert all(len(line) <= 80 for line in out.splitlines() if "folder:" not in line and "points/" not in line)
    assert sum(line.startswith("verified parallel decoding") for line in lines) == 6, "no speed of likelihoods"
