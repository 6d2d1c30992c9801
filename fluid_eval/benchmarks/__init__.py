"""Benchmarks: lm-eval tasks, datasets, chat templates, evaluation profiles, HumanEval samples."""
