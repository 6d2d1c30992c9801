"""Errors, settings by name, files of bounded size."""
