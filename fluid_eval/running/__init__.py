"""Running a spec: the job, lm-eval's model interface, the workers, facts of the machine."""
