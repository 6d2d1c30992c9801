"""Logs of other harnesses, read as they document them: lm-eval, EvalScope, inspect_ai, human-eval. No torch."""
