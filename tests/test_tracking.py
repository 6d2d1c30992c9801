"""`--track`: finished runs and sweeps in an experiment tracker, by its own library where that is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fluid_eval.cli.main import main
from fluid_eval.output import tracking
from fluid_eval.results.run_folder import RESULT
from fluid_model import ConfigError

from .runs import write_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def finished(tmp_path):
    """A run's folder and result, with one speed unknown."""
    folder = write_run(tmp_path / "run")
    result = json.loads((folder / RESULT).read_text())
    for line in result["lines"]:
        if line["task"] == "gsm8k":
            line |= {"forwards": None, "tokens_per_forward": None}
    return folder, result


def fake(monkeypatch, name: str, **members) -> list:
    """A module of this name that notes its calls."""
    calls: list = []
    module = ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    for member in members or ("init", "log", "finish"):
        setattr(module, member, lambda *a, _name=member, **k: calls.append((_name, *a, k)))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tensorboard_holds_scores_speeds_settings_and_health(finished):
    pytest.importorskip("tensorboard", reason="the tracker's library is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, result = finished
    tracking.track_run("tensorboard", folder, result)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    line = result["lines"][0]
    names = events.Tags()["scalars"]
    (score,) = events.Scalars("gsm8k/exact_match,strict-match")
    assert score.value == pytest.approx(line["score"])
    assert events.Scalars("gsm8k/tokens")[0].value == line["tokens"]
    assert "gsm8k/forwards" not in names  # unknown
    assert "health/gsm8k/length limit" in names
    assert "decoder.name | fluid" in str(events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0])


def test_a_run_s_numbers_and_settings_reach_trackio(finished, monkeypatch):
    calls = fake(monkeypatch, "trackio")
    folder, result = finished
    tracking.track_run("trackio", folder, result)
    (_, opened), (_, numbers, _), (finish, _) = calls
    assert (opened["project"], opened["name"], opened["group"], finish) == ("fluid-eval", "run", None, "finish")
    assert opened["config"]["id"] == json.loads((folder / "spec.json").read_text())["id"]
    assert opened["config"]["decoder.verify"] is True
    assert numbers["gsm8k/exact_match,strict-match"] == result["lines"][0]["score"]
    assert not {"gsm8k/forwards", "gsm8k/tokens_per_forward"} & numbers.keys()
    assert "mmlu/tokens_per_second" not in numbers


def test_a_sweep_is_one_tracked_run_a_point(tmp_path, monkeypatch):
    calls = fake(monkeypatch, "trackio")
    interval = {"mean": 0.5, "low": 0.25, "high": None, "n": 4}
    points = []
    for name in ("ar", "fluid"):
        write_run(tmp_path / "points" / name, name)
        points.append(
            {
                "name": name, "folder": f"points/{name}", "n": 4, "score": interval, "tokens_per_second": None,
                "tokens_per_forward": interval, "forwards_per_answer": None,
            }
        )  # fmt: skip
    result = {"id": "abc", "points": points, "frontier": ["fluid"], "health": []}
    tracking.track_sweep("trackio", tmp_path, result)
    opened = [call[-1] for call in calls if call[0] == "init"]
    assert [(one["name"], one["group"], one["config"]["decoder.name"]) for one in opened] == [
        ("ar", "abc", "ar"),
        ("fluid", "abc", "fluid"),
    ]
    logged = [call[1] for call in calls if call[0] == "log"]
    assert logged[1] == {
        "n": 4, "on_frontier": 1.0, "score": 0.5, "score/low": 0.25, "tokens_per_forward": 0.5,
        "tokens_per_forward/low": 0.25,
    }  # fmt: skip


def test_wandb_offline(finished, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the tracker's library is an extra")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    tracking.track_run("wandb", *finished)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_in_a_file(finished, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the tracker's library is an extra")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    tracking.track_run("mlflow", *finished)
    (run,) = mlflow.search_runs(experiment_names=["fluid-eval"], output_format="list")
    assert run.data.metrics["gsm8k/exact_match_strict-match"] == pytest.approx(finished[1]["lines"][0]["score"])
    assert run.data.params["decoder.name"] == "fluid"


def test_a_missing_library_is_one_line_before_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    words = ["run", "--tasks", "mini_gsm8k_1", "--model", "tiny-ar", "--limit", "1", "--out", str(tmp_path / "run")]
    assert main([*words, "--track", "wandb"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "fluid-eval: track=wandb: wandb is not installed; pip install 'fluid-eval[wandb]'"
    assert not (tmp_path / "run").exists()


def test_a_library_s_failure_is_one_line(finished, monkeypatch):
    monkeypatch.setitem(tracking._WRITERS, "trackio", lambda run: SimpleNamespace().missing)
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"^track=trackio: AttributeError: .*; the run itself is stored$"):
        tracking.track_run("trackio", *finished)


def test_the_page_names_every_tracker_and_its_extra():
    page = (ROOT / "docs" / "tracking.md").read_text()
    extras = (ROOT / "pyproject.toml").read_text()
    for name in tracking.TRACKERS:
        assert f"fluid-eval[{name}]" in page
        assert re.search(rf"^{name} = ", extras, re.MULTILINE)
