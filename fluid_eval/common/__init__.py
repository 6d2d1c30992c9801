"""What every package stands on: the spec of a run, intervals and tests, tables, paths, progress bars."""
