"""Every source file of the checkout as a module, and the imports between them.

Ground first: fluid_model <- fluid_eval <- bench <- tests. A package imports only those before it, and inside a package
a room (a subpackage, or a file beside them) imports only the rooms before it.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fluid_model", "fluid_eval", "bench", "tests")
"""Ground first."""
ROOMS = {
    "fluid_model": (
        *(
            "common",
            "settings",
            "registry",
            "tokens",
            "forward",
            "checkpoints",
            "engine",
            "scoring",
            "decoders",
            "train",
        ),
    ),
    "fluid_eval": (
        *("common", "sandbox", "results", "benchmarks", "running", "claims", "sweeps", "analysis", "output", "cli"),
    ),
}
"""What stands at the top of each package, ground first."""


def python_files() -> list[Path]:
    """All of this project's Python files, those of tasks and recipes included."""
    folders = (*PACKAGES, "tasks", "recipes")
    return [*(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))), ROOT / "noxfile.py"]


def c_files() -> list[Path]:
    """The compiled forward's sources."""
    return sorted(file for file in (ROOT / "fluid_model").rglob("*") if file.suffix in (".c", ".h"))


def module_name(file: Path) -> str:
    """`fluid_model.engine.loop`; a package has the name of its folder."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in python_files()}


@cache
def parsed(file: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree but the most frequent that say nothing here."""
    return tuple(node for node in ast.walk(parsed(file)) if not isinstance(node, ast.expr_context | ast.Constant))


def imports(module: str, modules: dict[str, Path] = MODULES) -> set[str]:
    """Absolute names that a module imports, anywhere in the file: inside functions and for type checkers too.

    `from ..forward import kv_cache` in `fluid_model.engine.loop` gives `fluid_model.forward.kv_cache`.
    """
    parts = module.split(".")
    package = parts if modules[module].name == "__init__.py" else parts[:-1]
    names: set[str] = set()
    for node in nodes(modules[module]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module] if node.module else base)
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def import_graph(modules: dict[str, Path] = MODULES) -> dict[str, set[str]]:
    """Module -> this project's modules it imports. A name inside a module counts as the module."""
    graph = {}
    for module in modules:
        names = imports(module, modules)
        owners = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (owners & modules.keys()) - {module}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """`a -> b -> a`, one for each way back that a depth-first walk meets."""
    finished: set[str] = set()
    rings: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            rings.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in finished:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    return rings


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a later package or room, as `a imports b`. Tasks, recipes and noxfile are imported by nothing."""
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if _rank(other) > _rank(module) or (_place(other) > _place(module) and _rank(other) == _rank(module))
    ]


def _rank(module: str) -> int:
    package = module.split(".")[0]
    return PACKAGES.index(package) if package in PACKAGES else len(PACKAGES)


def _place(module: str) -> int:
    """Of a room inside its package: behind all rooms for the package's own files, 0 where rooms have no order."""
    package, _, rest = module.partition(".")
    rooms = ROOMS.get(package, ())
    name = rest.split(".")[0]
    return rooms.index(name) if name in rooms else len(rooms)


def mutual(graph: dict[str, set[str]]) -> list[str]:
    """Siblings at any depth, folders or files, that import each other, as `a <-> b`."""
    pairs = [crossing(module, other) for module, others in graph.items() for other in others]
    arrows = {pair for pair in pairs if pair is not None}
    return sorted(f"{a} <-> {b}" for a, b in arrows if a < b and (b, a) in arrows)


def crossing(module: str, other: str) -> tuple[str, str] | None:
    """The sibling folders or files that an import crosses, where the two names part. None: one holds the other.

    fluid_eval.cli.run, fluid_eval.running.job -> fluid_eval.cli, fluid_eval.running
    """
    ours, theirs = module.split("."), other.split(".")
    for depth, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        if a != b:
            return ".".join(ours[:depth]), ".".join(theirs[:depth])
    return None


def rooms_at_the_top(package: str) -> list[str]:
    """Folders with code and modules of a package, those that begin with an underscore apart. What a checkout keeps of
    folders that are gone, compiled files, is no room.
    """
    files = [file.relative_to(ROOT / package) for file in (ROOT / package).rglob("*.py")]
    return sorted({Path(file.parts[0]).stem for file in files if not file.parts[0].startswith("_")})
