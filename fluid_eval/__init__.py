"""Evaluation of language models that decode in parallel, beside the autoregressive models they were adapted from.

`load_results(folder)` gives a run's samples as a pandas DataFrame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results.finished_runs import load_results

__all__ = ["load_results"]


def __getattr__(name: str) -> Any:
    """Import the names in `__all__` on first use: the sandbox's processes need none of them."""
    if name != "load_results":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .results.finished_runs import load_results

    return load_results
