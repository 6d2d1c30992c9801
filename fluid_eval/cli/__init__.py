"""The commands of `fluid-eval`, one file each: `HELP`, arguments (`add`) and action (`main`, returns the exit code).

Heavy imports happen inside `main`, so that `--help` is fast.
"""

EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_UNHEALTHY, EXIT_WORSE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Done; failed run or samples; invalid input; a health gate over its threshold; worse than allowed; interrupted."""
