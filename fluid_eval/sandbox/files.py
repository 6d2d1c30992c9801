"""The interpreter's own files: all that a program may read."""

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
"""Imports each extension module of the folder it is given and names the shared objects that are loaded then."""


@dataclass(frozen=True)
class Files:
    """executable: the interpreter, links followed.  binds: (what is on this machine, where a program finds it), files
    and folders.  hidden: folders below them that are left out.
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
    told = subprocess.run(words, capture_output=True, text=True, check=True, env={}, cwd="/").stdout.split("\n")
    binds = {executable: executable, **{folder: folder for folder in standard}}
    for mapped in filter(None, told):
        if not any(mapped.startswith(f"{folder}/") for folder in standard):
            binds |= _library(Path(mapped))
    loaders = [str(file) for folder in ("/lib", "/lib64") for file in Path(folder).glob("ld-*.so*")]
    binds |= {file: file for file in (*loaders, "/etc/ld.so.cache") if os.path.exists(file)}
    hidden = [os.path.join(folder, name) for folder in standard for name in ("site-packages", "dist-packages")]
    return Files(executable, tuple((v, k) for k, v in binds.items()), tuple(filter(os.path.isdir, hidden)))


def _library(mapped: Path) -> dict[str, str]:
    """Place -> source of a shared object: a distribution's folder of such whole, since binding each of them would take
    longer than to start an interpreter; elsewhere, and where Python's packages lie too, its names alone.
    """
    folder = mapped.parent
    if folder.is_relative_to("/usr/lib") and not any(folder.glob("python*")):
        found = {str(folder): str(folder)}
    else:
        found = {str(name): str(mapped) for name in folder.glob("*.so*") if name.resolve() == mapped}
    short = Path("/", *folder.parts[2:])  # /usr/lib/... is /lib/... too, where the two are merged
    if folder.parts[1:2] == ("usr",) and short.resolve() == folder:
        found |= {name.removeprefix("/usr"): source for name, source in found.items()}
    return found
