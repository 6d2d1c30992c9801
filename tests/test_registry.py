"""Decoders by name: a user's own class, presets, other packages; what is missing is one line before weights load."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fluid_model
from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.results import speed_conditions
from fluid_eval.results.run_folder import held_spec, read_samples
from fluid_eval.running import ray_pool
from fluid_model import ConfigError, FluidSettings, LladaSettings, registry
from fluid_model.registry import decoder_named, decoder_settings, decoders, default_decoder, plain_values

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/own-decoder.md").read_text()
BASE = {"tasks": "mini", "model": "m"}
OWN = [kind.name for kind in registry.BUILT_IN]
CLASS = '''
from dataclasses import dataclass
from fluid_model import DecoderSettings
@dataclass(frozen=True)
class One(DecoderSettings):
    """A decoder."""
    strategy = "{module}:Strategy"
    methods = ("llada",)
'''


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """A working directory, without what other tests named or imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_named", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    registry._source.cache_clear()
    registry._entry_points.cache_clear()


@pytest.fixture
def files(tmp_path):
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.S):
        (tmp_path / name).write_text(text)
    return tmp_path


def module(folder, name, text=CLASS, **replaced):
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text.replace("{module}", name))
    return f"{name}:One"


def package(folder, name, value):
    """An installed package with one entry point."""
    info = folder / f"{name}_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[fluid_eval.decoders]\n{name} = {value}\n")
    sys.path.append(str(folder))
    registry._entry_points.cache_clear()


def test_the_example_of_the_docs_runs_and_is_recorded(files, capsys):
    (command,) = re.findall(r"<!-- run -->\n```\nfluid-eval (.*)\n```", PAGE)
    gates = ["--set", "health.length_limit=1", "--set", "health.no_answer=1", "--set", "health.empty_answer=1"]
    assert main([*command.split(), *gates, "--out", "run"]) == 0
    spec = json.loads((files / "run/spec.json").read_text())
    assert spec["decoder"] == {"name": "topk:TopK", "source": registry.source_of(decoder_named("topk:TopK")), "k": 4}
    for record in read_samples(files / "run"):
        assert record["trace"]["forwards"]["denoise"] == 6, "24 tokens, four a step"
        assert len(record["output_ids"]) <= 24
    assert main(["settings", "topk:TopK"]) == 0
    assert "decoder.k" in (listed := capsys.readouterr().out)
    assert "Tokens written at each step." in listed


def test_the_example_at_one_token_a_step_is_llada_on_one_block(files):
    """Its weights predict the next token, so the example has to read the slot before."""
    checkpoint = fluid_model.load(str(ROOT / "checkpoints/tiny-llada"))
    prompt = tuple(checkpoint.tokenizer("Question: There are 17 plates. 6 are sold. How many?\nAnswer:")["input_ids"])
    llada = LladaSettings(gen_length=16, block_length=16, steps=16)
    texts = [
        next(iter(fluid_model.engine_for(checkpoint, decoder).generate([fluid_model.Request("0", prompt, 16)]))).text
        for decoder in (decoder_settings({"name": "topk:TopK", "k": 1}), llada)
    ]
    assert texts[0] == texts[1] != ""


def test_a_preset_is_the_same_decoder_with_other_defaults(files):
    preset = build_spec({**BASE, "decoder": "presets:TopEight"})
    values = preset.to_dict()["decoder"]
    assert (values["name"], values["k"]) == ("presets:TopEight", 8)
    assert preset.decoder.strategy == "topk:TopKStrategy"
    assert preset.id != build_spec({**BASE, "decoder": {"name": "topk:TopK", "k": 8}}).id
    assert main(["settings", "presets:TopEight"]) == 0


def test_a_stored_run_has_no_code_imported_until_it_is_named(files):
    spec = build_spec({**BASE, "decoder": "topk:TopK"})
    (files / "run").mkdir()
    (files / "run/spec.json").write_text(json.dumps(spec.to_dict()))
    assert held_spec(files / "run") == spec
    registry._named.clear()
    for name in ("topk", "os"):
        with pytest.raises(ConfigError, match=rf"'{name}:TopK' is code, imported only .*: pass --decoder {name}:TopK"):
            build_spec({**BASE, "decoder": f"{name}:TopK"}, stored=True)
    assert speed_conditions.drafts_by_cost({"decoder": {"name": "topk:TopK"}}) is False
    assert registry._named == {}, "nor by what reads conditions"
    assert main(["audit", "run"]) == 2


def test_other_code_is_another_run(files):
    spec = build_spec({**BASE, "decoder": "topk:TopK"})
    stored, before = spec.to_dict(), spec.id
    registry._source.cache_clear()
    with (files / "topk.py").open("a") as handle:
        handle.write("# changed\n")
    assert build_spec({**BASE, "decoder": "topk:TopK"}).id != before
    with pytest.raises(ConfigError, match=r"decoder=topk:TopK: its source has hash .* here, .* in the run"):
        build_spec(stored)


def test_the_strategys_file_belongs_to_the_source(tmp_path):
    module(tmp_path, "apart", strategy='strategy = "written:Strategy" #')
    (tmp_path / "written.py").write_text("class Strategy: ...\n")
    first = plain_values(decoder_settings({"name": "apart:One"}))["source"]
    registry._source.cache_clear()
    (tmp_path / "written.py").write_text("class Strategy: x = 1\n")
    assert plain_values(decoder_settings({"name": "apart:One"}))["source"] != first
    assert "source" not in plain_values(FluidSettings()), "ids of this package's decoders stay"


def test_a_package_registers_by_an_entry_point(tmp_path, capsys):
    module(tmp_path, "others", strategy='name = "other"; strategy', llada="odd")
    package(tmp_path, "other", "others:One")
    assert default_decoder("fluid") == "fluid"
    assert decoder_named("llada") is LladaSettings
    assert "others" not in sys.modules, "loaded only where a name is not known"
    assert default_decoder("odd") == "other"
    assert build_spec({**BASE, "decoder": "other"}, stored=True).decoder.name == "other"
    assert build_spec({**BASE, "model": {"path": "m", "method": "odd"}}).model.method == "odd"
    assert main(["decoders", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [*OWN, "other"]


def test_a_broken_package_is_left_out_of_lists_and_named_in_one_line(tmp_path, caplog):
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    package(tmp_path, "broken", "broken:One")
    assert list(decoders()) == OWN
    assert "No module named 'no_such_library'" in caplog.text
    with pytest.raises(ConfigError, match=r"broken:One: importing 'broken' failed: ModuleNotFoundError: No module"):
        decoder_named("broken")


LACKING = {
    "decorator": ({"@dataclass(frozen=True)\n": ""}, r"the class lacks @dataclass\(frozen=True\)"),
    "docstring": ({'    """A decoder."""\n': ""}, "the class lacks a docstring"),
    "strategy": ({"strategy =": "other ="}, 'the class lacks strategy = "module:Class"'),
    "methods": ({'("llada",)': '"llada"'}, "the class lacks a tuple methods"),
    "typed": ({"methods =": "methods: tuple ="}, "methods without a type: with one it would be a setting"),
    "base": ({"(DecoderSettings)": ""}, "no subclass of fluid_model.DecoderSettings"),
    "class": ({"class One": "class Two"}, "has no class or function 'One'"),
    "own name": ({"    methods": '    name = "mine"\n    methods'}, "named as mine, by an entry point of fluid_eval"),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_a_class_lacks_is_one_line(what, tmp_path):
    replaced, message = LACKING[what]
    with pytest.raises(ConfigError, match=message) as caught:
        build_spec({**BASE, "decoder": module(tmp_path, f"lacks_{what.replace(' ', '_')}", **replaced)})
    assert "\n" not in str(caught.value)


def test_a_strategy_that_lacks_a_method_is_refused_before_weights_load(tmp_path, monkeypatch, capsys):
    name = module(tmp_path, "halfway", CLASS + "class Strategy:\n    def plan(self, rows): ...\n")
    monkeypatch.setattr("fluid_model.checkpoints.checkpoint.load", None)
    assert main(["run", "--tasks", "mini_gsm8k", "--model", "tiny-llada", "--decoder", name, "--out", "run"]) == 2
    assert "halfway:Strategy lacks prompt_mask_block, draft_policy, allocate, admit, absorb" in capsys.readouterr().err


def test_an_unknown_name_has_the_known_and_the_nearest_one():
    with pytest.raises(ConfigError, match=r"decoder='lada' is unknown; did you mean llada\? known: ar, fluid, nbdiff"):
        decoder_named("lada")
    with pytest.raises(ConfigError, match="importing 'nowhere' failed: ModuleNotFoundError"):
        decoder_named("nowhere:One")
    with pytest.raises(ConfigError, match=r"model.method='odd' is unknown; known: nbdiff, llada, mdlm"):
        build_spec({**BASE, "model": {"path": "m", "method": "odd"}})


def test_a_preset_of_this_package_would_need_one_class(monkeypatch):
    @dataclass(frozen=True)
    class Shifted(LladaSettings):
        """LLaDA's sampler, shifted."""

        name = "shifted"
        methods = ("other",)
        shift: bool | None = True

    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, Shifted))
    spec = build_spec({**BASE, "decoder": "shifted"})
    assert spec.to_dict()["decoder"].items() >= {**vars(LladaSettings()), "name": "shifted", "shift": True}.items()
    assert default_decoder("other") == "shifted"
    assert default_decoder("llada") == "llada"
    assert build_spec({**BASE, "decoder": {"name": "shifted", "shift": False}}).decoder == Shifted(shift=False)


@pytest.fixture
def topk_package(tmp_path, monkeypatch):
    """The docs' decoder as an installed package, which registers it as topk. Returns its folder."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (folder := tmp_path / "site").mkdir()
    (text,) = re.findall(r"<!-- file: topk.py -->\n```\w+\n(.*?)```", PAGE, re.S)
    (folder / "topk.py").write_text(
        text.replace('    methods = ("llada",)', '    name = "topk"\n    methods = ("llada",)')
    )
    package(folder, "topk", "topk:TopK")
    return folder


TOPK = ["run", "--decoder", "topk", "--model", "tiny-llada", "--tasks", "mini_gsm8k_1"]
TOPK += ["--limit", "3", "--max-new-tokens", "8"]
ON_RAY = ["--engine", "ray", "--workers", "2"]


@pytest.mark.cluster
def test_ray_s_workers_find_a_package_s_decoder_by_its_entry_point(topk_package, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(topk_package), prepend=os.pathsep)  # installed, for other processes
    assert main([*TOPK, *ON_RAY, "--out", "ray"]) in (0, 3)
    assert main([*TOPK, "--out", "inline"]) in (0, 3)
    ray, inline = ({r["key"]: r for r in read_samples(tmp_path / name)} for name in ("ray", "inline"))
    assert len(ray) == 3
    for key, record in inline.items():
        assert ray[key]["output_ids"] == record["output_ids"] != [], key
        assert ray[key]["trace"]["forwards"] == record["trace"]["forwards"]
    assert json.loads((tmp_path / "ray/spec.json").read_text())["decoder"]["name"] == "topk"
    assert json.loads((tmp_path / "ray/environment.json").read_text())["engine"]["workers"] == 2


@pytest.mark.cluster
def test_a_decoder_that_this_process_alone_knows_fails_on_ray_in_one_line(topk_package, tmp_path, capsys):
    assert main([*TOPK, *ON_RAY, "--out", "ray"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fluid-eval: decoder='topk' is unknown; known: ar, fluid")
    assert last.endswith(
        "raised in a Ray worker, another process, which must find the decoder by itself: in a package installed there, "
        "in the working directory, or by PYTHONPATH"
    )
    assert not (tmp_path / "ray").exists()


def test_what_a_worker_cannot_find_says_where_it_looks():
    """As raised there and sent here; other errors of a worker stay as they are."""
    for reference in ("topk:TopK", "fluid_model:NoSuchDecoder"):
        with pytest.raises(ConfigError) as raised:
            registry.resolve(reference)
        sent = pickle.loads(pickle.dumps(raised.value))
        assert str(ray_pool._with_way_out(sent)).startswith(f"{raised.value}: raised in a Ray worker")
    other = ConfigError("decoder=llada: its model has no mask token")
    assert ray_pool._with_way_out(other) is other


def test_a_notebook_s_decoder_wants_a_file(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Shown", FluidSettings, raising=False)
    monkeypatch.setattr(FluidSettings, "strategy", "__main__:Strategy")
    with pytest.raises(ConfigError, match=r"a decoder of '__main__' .* is in no file that others can import: give it"):
        registry.source_of(FluidSettings)
