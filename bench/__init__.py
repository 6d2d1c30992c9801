"""Commands that measure this project against its own claims and its peers: a table, or with --json one object."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
