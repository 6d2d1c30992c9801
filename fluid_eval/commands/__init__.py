"""The commands of `fluid-eval`, one file each: `HELP`, its arguments (`add`) and what it does (`main`, the exit code).

They import what they need when they run, so that `--help` costs nothing.
"""
