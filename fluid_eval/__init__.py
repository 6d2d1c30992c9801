"""Evaluates language models that write in parallel, beside the autoregressive ones they came from.

`load_results(folder)` gives a run's samples as a pandas DataFrame.
"""

from __future__ import annotations

from .store import load_results

__all__ = ["load_results"]
