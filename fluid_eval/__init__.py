"""Evaluation of language models that decode in parallel, beside the autoregressive models they were adapted from.

    import fluid_eval

    result = fluid_eval.run(tasks="gsm8k", model="checkpoints/tiny-fluid", limit=8)
    result.row("gsm8k").score, result.samples[0].output

docs/python.md has a complete example. Errors of input are ConfigError, in one line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluid_model.common.errors import ConfigError, RunError

    from ._api import audit, compare, import_logs, load_run, load_sweep, report, run, sweep
    from ._api_results import AuditResult, Comparison, Result, SweepResult
    from .common.progress import ProgressEvent
    from .results.finished_runs import load_results
    from .results.sample import Sample

__all__ = [
    "AuditResult", "Comparison", "ConfigError", "ProgressEvent", "Result", "RunError", "Sample", "SweepResult",
    "audit", "compare", "import_logs", "load_results", "load_run", "load_sweep", "report", "run", "sweep",
]  # fmt: skip

_HOMES = {
    "fluid_eval._api": ("audit", "compare", "import_logs", "load_run", "load_sweep", "report", "run", "sweep"),
    "fluid_eval._api_results": ("AuditResult", "Comparison", "Result", "SweepResult"),
    "fluid_eval.common.progress": ("ProgressEvent",),
    "fluid_eval.results.finished_runs": ("load_results",),
    "fluid_eval.results.sample": ("Sample",),
    "fluid_model.common.errors": ("ConfigError", "RunError"),
}
"""Module -> the names of `__all__` that it defines."""


def __getattr__(name: str) -> Any:
    """Import the names in `__all__` on first use: the sandbox's processes need none of them."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
