"""The names of tasks: this package's, those of a user's folder, lm-eval's own. lm-eval is not imported.

lm-eval's own index parses its 14,000 files with their templates, which takes a quarter of a minute. Here only the lines
are parsed that decide a name, its kind and its members (`KEYS`), and what lm-eval's folder holds is kept in the user's
cache folder, under lm-eval's version and the folder's time.

    "mbpp"         in lm-eval's folder            Named(kind="task", output_type="generate_until", unsafe=True, …)
    "gsm8k"        in tasks/, and in lm-eval's    ours: the first of `Catalogue`'s sources that has the name
    "ai2_arc"      a tag                          its tasks, each in a row of its own
    "mmlu_pro"     a group                        one row, over the documents of its tasks
    "arc_*"        a pattern                      all names that match, without those inside a group among them
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from fluid_model.common import cache_folder, files
from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.common.names import did_you_mean

from ..common.paths import resource

KEYS = "task group tag include class output_type unsafe_code"
"""Keys of a task file that are read here; all others wait until the task is built."""
Kind = Literal["task", "python", "group", "tag"]
Source = Literal["fluid-eval", "own", "lm-eval"]
CACHE = "lm-eval-tasks.json"
FORMAT = 1
"""Of the cached index; another number means another format."""
_KEY = re.compile(rf"""["']?({KEYS.replace(" ", "|")})["']?[ \t]*:""")
_WILD = re.compile(r"[*?[]")
_SIMPLE = re.compile(r"""([a-z_]+): +(?:"([^"\\]*)"|([A-Za-z_][\w.-]*)) *""")
_OTHER_TYPES = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


@dataclass(frozen=True)
class Named:
    """One name. kind: python for tasks that are a class.  file: None for a tag.  output_type: as in lm-eval's files.

    unsafe: marked as running code that the model writes.  members: names inside a group or tag, one level down.
    """

    name: str
    kind: Kind
    source: Source
    file: Path | None
    output_type: str | None = None
    unsafe: bool = False
    members: tuple[str, ...] = ()

    @property
    def is_task(self) -> bool:
        return self.kind in ("task", "python")


Names = Mapping[str, Named]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C parser where there is one
    """YAML with lm-eval's `!function`, which stays a text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_folder(folder: Path, source: Source) -> dict[str, Named]:
    """All names that a folder's task files define, found as lm-eval does. Files that are no task files are skipped."""
    names: dict[str, Named] = {}
    read: dict[Path, Nested] = {}
    for file in sorted(_yaml_files(folder), key=Path.as_posix):
        try:
            values = _merged(file, read, ())
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        named = _named(values, file, source)
        if named is None or named.name in names:
            continue
        names[named.name] = named
        tags = values.get("tag") if named.is_task else None
        for tag in tags if isinstance(tags, list) else [tags] if tags else []:
            one = names.setdefault(tag, Named(tag, "tag", source, None))
            names[tag] = replace(one, members=tuple(sorted({*one.members, named.name})))
    return names


def _yaml_files(folder: Path) -> Iterator[Path]:
    for place, folders, inside in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("__pycache__", ".ipynb_checkpoints")]
        yield from (Path(place, name) for name in inside if name.endswith(".yaml"))


def _merged(file: Path, read: dict[Path, Nested], above: tuple[Path, ...]) -> Nested:
    """The KEYS of a file, with those of the files that it includes. read: files read before."""
    if file in read:
        return read[file]
    if file in above:
        raise ValueError(f"{file} includes itself")
    values = _own_keys(file.read_text(encoding="utf-8"))
    included = values.pop("include", [])
    merged: Nested = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _merged(Path(os.path.normpath(file.parent / name)), read, (*above, file))
    read[file] = merged | values
    return read[file]


def _own_keys(text: str) -> Nested:
    """The KEYS of a file's text."""
    lines, keep = [], False
    for line in text.splitlines():
        if line[:1] not in (" ", "\t", "-", "#", "]", "}", ""):
            keep = _KEY.match(line) is not None
        if keep:
            lines.append(line)
    values = _plain(lines) or (yaml.load("\n".join(lines), Loader=_Loader) if lines else None)
    if not isinstance(values, dict):  # keys in quotes or braces
        values = yaml.load(text, Loader=_Loader)
    if not isinstance(values, dict):
        raise ValueError("no table")
    return {key: value for key, value in values.items() if key in KEYS.split()}


def _plain(lines: list[str]) -> Nested | None:
    """The values of lines that are all `key: word` or `key: "words"`, as most are; None if one is not."""
    matches = [_SIMPLE.fullmatch(line) for line in lines]
    if not all(match and (match[3] or "").lower() not in _OTHER_TYPES for match in matches):
        return None
    return {match[1]: match[2] if match[3] is None else match[3] for match in matches if match}


def _named(values: Nested, file: Path, source: Source) -> Named | None:
    """What a file defines; None for a template."""
    output_type, unsafe = values.get("output_type"), bool(values.get("unsafe_code"))
    task, group = values.get("task"), values.get("group")
    if "class" in values and isinstance(task, str):
        return Named(task, "python", source, file, output_type, unsafe)
    if isinstance(group, str):
        return Named(group, "group", source, file, members=tuple(_members(task)))
    return Named(task, "task", source, file, output_type, unsafe) if isinstance(task, str) else None


def _members(tasks: Any) -> Iterator[str]:
    """Names in a group's list; of a group written inside it, its members."""
    for item in tasks if isinstance(tasks, list) else []:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and isinstance(item.get("task"), list):
            yield from _members(item["task"])
        elif isinstance(item, dict):
            yield str(item.get("task", item.get("group")))


def lm_eval_folder() -> Path:
    """Where lm-eval keeps its task files."""
    package = find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("lm-eval is not installed: pip install lm-eval")
    return Path(package.submodule_search_locations[0]) / "tasks"


@cache
def of_lm_eval() -> Names:
    """lm-eval's own names, from the user's cache folder where they lie there; without a cache folder read each time."""
    folder = lm_eval_folder()
    key = [FORMAT, version("lm_eval"), str(folder), folder.stat().st_mtime_ns]
    try:
        if (file := cache_folder.cached_file(CACHE)) is not None:
            stored = json.loads(file.read_bytes())
            if stored["key"] == key:
                return {row[0]: _from_row(row, folder) for row in stored["names"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        pass
    names = read_folder(folder, "lm-eval")
    try:
        rows = [_to_row(named, folder) for named in names.values()]
        files.write(cache_folder.folder() / CACHE, json.dumps({"key": key, "names": rows}))
    except OSError:
        pass
    return names


def _to_row(named: Named, folder: Path) -> list[Any]:
    file = named.file and named.file.relative_to(folder).as_posix()
    return [named.name, named.kind, file, named.output_type, named.unsafe, list(named.members)]


def _from_row(row: list[Any], folder: Path) -> Named:
    name, kind, file, output_type, unsafe, members = row
    return Named(name, kind, "lm-eval", file and folder / file, output_type, unsafe, tuple(members))


class Catalogue:
    """Names by precedence: this package's, those of the user's folder, lm-eval's. lm-eval's are read when needed."""

    def __init__(self, tasks_dir: str | None) -> None:
        """Raises ConfigError if the user's folder is none, or holds no task file."""
        self._tasks_dir = tasks_dir
        self.own: Names = {}
        if tasks_dir is not None:
            if not Path(tasks_dir).is_dir():
                raise ConfigError(f"tasks_dir={tasks_dir}: no such folder; name one that holds lm-eval task files")
            self.own = read_folder(Path(tasks_dir), "own")
            if not self.own:
                raise ConfigError(f"tasks_dir={tasks_dir}: no file NAME.yaml in it defines a task (a key `task:`)")

    def find(self, name: str) -> Named | None:
        """What a name stands for. Raises ConfigError if both this package and the user's folder define it."""
        if name in (ours := of_this_package()):
            if name in self.own:
                raise ConfigError(
                    f"task {name!r} of {self.own[name].file or self._tasks_dir} has a name of this package's; give it "
                    "another"
                )
            return ours[name]
        return self.own.get(name) or of_lm_eval().get(name)

    @cached_property
    def all(self) -> Names:
        """Every name."""
        return {**of_lm_eval(), **self.own, **of_this_package()}

    def check(self, names: Iterable[str]) -> None:
        """Raise ConfigError, naming close ones, if a name is unknown."""
        for name in names:
            if self.find(name) is None:
                meant = did_you_mean(name, self.all)
                raise ConfigError(f"task {name!r} is unknown; {meant}`fluid-eval tasks PATTERN` lists names")

    def inside(self, name: str) -> set[str]:
        """All names inside a group or tag, at any depth; none for a task."""
        named = self.find(name)
        members = set(named.members) - {name} if named is not None else set()
        return members.union(*map(self.inside, members))

    def outermost(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names, each once, without those inside a group among them."""
        names = dict.fromkeys(names)
        nested = {member for name in names for member in self.inside(name)}
        return tuple(name for name in names if name not in nested)

    def expand(self, names: Iterable[str]) -> tuple[str, ...]:
        """Patterns as the names that match, tags as their tasks. Raises ConfigError for a pattern without a match."""
        expanded: list[str] = []
        for name in names:
            if _WILD.search(name) is None:
                expanded += self._tasks_of(name)
                continue
            matching = sorted(fnmatch.filter(self.all, name))
            if not matching:
                raise ConfigError(f"task pattern {name!r} matches no name; `fluid-eval tasks PATTERN` lists them")
            expanded += self.outermost(task for match in matching for task in self._tasks_of(match))
        return tuple(dict.fromkeys(expanded))

    def _tasks_of(self, name: str) -> tuple[str, ...]:
        named = self.find(name)
        return named.members if named is not None and named.kind == "tag" else (name,)

    def needed(self, names: Iterable[str]) -> dict[str, Named]:
        """The known ones among names, and all inside them."""
        wanted = {inner for name in names for inner in ({name} | self.inside(name))}
        return {name: named for name in sorted(wanted) if (named := self.find(name)) is not None}

    def unsafe(self, names: Iterable[str]) -> list[str]:
        """Names of tasks and groups that run model-written code."""
        return [name for name in names if any(named.unsafe for named in self.needed([name]).values())]

    def writes(self, name: str) -> bool:
        """Whether a task, or one inside a group, generates answers rather than comparing likelihoods."""
        return any(named.output_type == "generate_until" for named in self.needed([name]).values())


@cache
def of_this_package() -> Names:
    """The names that this package defines, in tasks/."""
    return read_folder(resource("tasks"), "fluid-eval")


def catalogue(tasks_dir: str | None = None) -> Catalogue:
    """The catalogue with a user's folder, read again when one of its files has changed."""
    changed = 0 if tasks_dir is None else max((f.stat().st_mtime_ns for f in _yaml_files(Path(tasks_dir))), default=0)
    return _catalogue(tasks_dir, changed)


@cache
def _catalogue(tasks_dir: str | None, _changed: int) -> Catalogue:
    return Catalogue(tasks_dir)


def digest(tasks_dir: str) -> str:
    """12 hex digits over the task files and their Python in a user's folder: a resumed run must find the same."""
    inside = (Path(place, name) for place, _, names in os.walk(tasks_dir) for name in names)
    hashed = hashlib.sha256()
    for file in sorted(inside):
        if file.suffix in (".py", ".yaml") or file.name.endswith("_yaml"):
            hashed.update(f"{file.relative_to(tasks_dir)}\0".encode() + file.read_bytes())
    return hashed.hexdigest()[:12]


def with_task_names(values: Mapping[str, Any]) -> Nested:
    """A run's values with patterns and tags among their tasks expanded, and the user's folder as an absolute path.

    Malformed values are returned unchanged: `build_spec` reports them.
    """
    values = dict(values)
    tasks, folder = values.get("tasks"), values.get("tasks_dir")
    if isinstance(folder, str):
        folder = values["tasks_dir"] = os.path.abspath(os.path.expanduser(folder))
    names = [name.strip() for name in tasks.split(",") if name.strip()] if isinstance(tasks, str) else tasks
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return values
    if not isinstance(folder, str | None):
        return values
    ours = of_this_package()
    simple = all(name in ours and ours[name].kind != "tag" for name in names)
    return {**values, "tasks": list(names) if simple else list(catalogue(folder).expand(names))}
