"""Running a spec: the job, lm-eval's model over our engine, the workers, the machine."""
