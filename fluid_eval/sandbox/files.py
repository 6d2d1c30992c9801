"""Files of the Python interpreter, which are the only files that a program can read."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

NO_SITE = ("-I", "-S")
"""Isolated mode, and no site-packages: the standard library is all there is."""
_MAPPED = """
import importlib, os, sys
for name in sorted(os.listdir(sys.argv[1])) if os.path.isdir(sys.argv[1]) else ():
    try:
        importlib.import_module(name.split(".")[0])
    except Exception:
        pass
print("\\n".join({line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}))
"""
"""Script: imports each extension module of a folder and prints the shared objects that are then loaded."""


@dataclass(frozen=True)
class Files:
    """Files of a jail. executable: the interpreter, links resolved.  binds: (source here, place in the jail), files and
    folders.  hidden: folders below them that the jail does not show.
    """

    executable: str
    binds: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...]


def interpreter_files() -> Files:
    """Executable, standard library and the shared objects they load. Raises OSError if the interpreter does not run."""
    executable = os.path.realpath(sys.executable)
    if sys.platform != "linux":
        return Files(executable, (), ())
    base = {"platbase": sys.base_exec_prefix}  # a virtual environment has no standard library of its own
    standard = list(dict.fromkeys(os.path.realpath(sysconfig.get_path(n, vars=base)) for n in ("stdlib", "platstdlib")))
    extensions = os.path.join(standard[-1], "lib-dynload")
    words = [executable, *NO_SITE, "-c", _MAPPED, extensions]
    mapped_objects = subprocess.run(words, capture_output=True, text=True, check=True, env={}, cwd="/").stdout.split(
        "\n"
    )
    binds = {executable: executable, **{folder: folder for folder in standard}}
    for mapped in filter(None, mapped_objects):
        if not any(mapped.startswith(f"{folder}/") for folder in standard):
            binds |= _library(Path(mapped))
    loaders = [str(file) for folder in ("/lib", "/lib64") for file in Path(folder).glob("ld-*.so*")]
    binds |= {file: file for file in (*loaders, "/etc/ld.so.cache") if os.path.exists(file)}
    hidden = [os.path.join(folder, name) for folder in standard for name in ("site-packages", "dist-packages")]
    return Files(executable, tuple((v, k) for k, v in binds.items()), tuple(filter(os.path.isdir, hidden)))


def _library(mapped: Path) -> dict[str, str]:
    """Place -> source of a shared object, under all its names.

    In /usr/lib its whole folder: binding the files one by one takes longer than starting an interpreter. Elsewhere, and
    in folders with Python packages, the object alone.
    """
    folder = mapped.parent
    if folder.is_relative_to("/usr/lib") and not any(folder.glob("python*")):
        binds = {str(folder): str(folder)}
    else:
        binds = {str(name): str(mapped) for name in folder.glob("*.so*") if name.resolve() == mapped}
    short = Path("/", *folder.parts[2:])  # /usr/lib/... is /lib/... too, where the two are merged
    if folder.parts[1:2] == ("usr",) and short.resolve() == folder:
        binds |= {name.removeprefix("/usr"): source for name, source in binds.items()}
    return binds
