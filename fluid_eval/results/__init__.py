"""Results of runs: the run folder, samples, metrics, health gates, speed repeats."""
