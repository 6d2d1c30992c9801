"""A checkpoint's method chooses the decoder unless another is named, and a run says which and why."""

from __future__ import annotations

import json
import shutil

import pytest

from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.results.run_folder import held_spec
from fluid_eval.running.decoder_choice import with_decoder
from fluid_eval.sweeps.grid import plan
from fluid_model import ConfigError


@pytest.fixture(scope="module")
def folders(tiny_model, tiny_fluid, tmp_path_factory):
    """One model of each method, and a FLUID checkpoint before its K-head."""
    root = tmp_path_factory.mktemp("methods")
    manifest = json.loads((tiny_fluid / "fluid.json").read_text())
    by_method = {"ar": tiny_model, "fluid": tiny_fluid}
    for name, method in (("nbdiff", "nbdiff"), ("llada", "llada"), ("headless", "fluid")):
        by_method[name] = shutil.copytree(tiny_fluid, root / name)
        changed = {**manifest, "method": method, "tau": []} | ({"k_max": None} if method != "fluid" else {})
        (by_method[name] / "fluid.json").write_text(json.dumps(changed))
    return by_method


WRITES = {"ar": "ar", "fluid": "fluid", "nbdiff": "nbdiff", "llada": "llada", "headless": "ar"}


@pytest.mark.parametrize("name", WRITES)
def test_the_method_chooses_and_the_id_holds_it(folders, name):
    values = {"tasks": "mini", "model": str(folders[name])}
    chosen = build_spec(with_decoder(values))
    assert chosen.decoder.name == WRITES[name]
    assert chosen.id == build_spec({**values, "decoder": WRITES[name]}).id
    assert build_spec(with_decoder({**values, "decoder": "ar"})).decoder.name == "ar", "what is named stays"


def test_settings_alone_are_the_own_decoders(folders):
    values = {"tasks": "mini", "model": str(folders["fluid"]), "decoder": {"verify": False}}
    assert build_spec(with_decoder(values)).decoder.verify is False
    with pytest.raises(ConfigError, match=r"decoder.verify is no setting of decoder 'ar' but of fluid; pass --decoder"):
        build_spec(with_decoder({**values, "model": str(folders["ar"])}))
    with pytest.raises(ConfigError, match=r"but of nbdiff and llada and .*; pass --decoder nbdiff or"):
        build_spec({**values, "decoder": {"name": "fluid", "block_length": 4}})


def test_a_method_that_the_user_names_counts(folders):
    model = {"path": str(folders["ar"]), "method": "llada"}
    assert with_decoder({"model": model})["decoder"] == {"name": "llada"}


def test_each_point_of_a_sweep_writes_as_its_model_does(folders):
    paths = [str(folders[name]) for name in ("ar", "fluid", "llada")]
    base = {"tasks": "mini", "model": paths[0], "decoder": {"temperature": 0.5}}
    points = plan({**base, "sweep": {"grid": {"model.path": paths}}}).points
    assert [(p.spec.decoder.name, p.spec.decoder.temperature) for p in points] == [
        ("ar", 0.5), ("fluid", 0.5), ("llada", 0.5),
    ]  # fmt: skip
    base = {"tasks": "mini", "model": paths[1], "decoder": {"confidence": 0.5}}
    points = plan({**base, "sweep": {"point": [{"decoder.name": "ar"}, {"decoder.name": "fluid"}]}}).points
    assert points[1].spec.decoder.confidence == 0.5, "the base's settings are its own decoder's, named or not"


ASKED = {
    "fluid": ([], "fluid: decoder fluid, by its adaptation; --decoder NAME chooses another"),
    "headless": ([], "headless: decoder ar, for it was adapted to fluid and has no K-head yet"),
    "ar": ([], "model: decoder ar, for it is a plain causal model"),
    "nbdiff": (["--decoder", "ar"], "nbdiff: decoder ar, as asked for; the checkpoint was adapted to nbdiff"),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_first_line_says_which_and_why(folders, name, tmp_path, capsys):
    words, line = ASKED[name]
    words = [*words, "--model", folders[name], "--tasks", "mini_gsm8k_1", "--limit", 1, "--max-new-tokens", 2]
    main(["run", *map(str, words), "--out", str(tmp_path / "r")])
    assert capsys.readouterr().err.splitlines()[0].startswith(line)
    assert held_spec(tmp_path / "r").decoder.name == line.split("decoder ")[1].split(",")[0]


def test_trace_writes_as_the_model_does(folders, capsys):
    assert main(["trace", "--prompt", "x", "--max-new-tokens", "2", "--model", str(folders["nbdiff"])]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("nbdiff: decoder nbdiff, by its adaptation")
    assert "decoder name=nbdiff" in out


def test_a_sweep_says_it_once_for_each_decoder(folders, tmp_path, capsys):
    words = ["--model", folders["fluid"], "--tasks", "mini_gsm8k_1", "--limit", 1, "--max-new-tokens", 2]
    words += ["--sweep", "decoder.slot_budget=4,8", "--dry-run", "--out", tmp_path / "s"]
    assert main(["sweep", *map(str, words)]) == 0
    assert capsys.readouterr().err.count("decoder fluid, by its adaptation") == 1
