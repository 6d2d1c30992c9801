"""Shared ground of all packages: the spec of a run, confidence intervals and tests, tables, paths, progress bars."""
