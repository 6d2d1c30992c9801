"""The commands of `fluid-eval`, one file each: `HELP`, its arguments (`add`) and what it does (`main`, the exit code).

They import what they need when they run, so that `--help` costs nothing.
"""

EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_UNHEALTHY, EXIT_WORSE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Done; failed, or samples given up; bad input; a health gate over its threshold; worse than allowed; interrupted."""
