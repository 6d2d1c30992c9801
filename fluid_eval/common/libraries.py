"""Defaults of other libraries, by their environment variables. They hold for libraries imported afterwards."""

from __future__ import annotations

import os


def set_library_defaults() -> None:
    """Set what the user has not: no bars and warnings beside ours, no threads that spin while they wait."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars are enough
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads must not spin on a shared machine
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
