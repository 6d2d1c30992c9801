"""The house, measured: layout, imports, sizes, words, and the files on two paths. `python -m bench.house [--json]`.

`tests/test_house.py` holds all of it but the two paths against the same LIMITS.
"""

from __future__ import annotations

LIMITS = {
    "rooms at the top of a package": 10,
    "upward imports": 0,
    "import cycles": 0,
    "packages that import each other": 0,
    "lines of the longest file": 400,
    "lines of the longest function": 60,
    "class names that stand in several modules": 0,
    "comprehensions per 1,000 lines of the dense core": 25,
    "lines of code per comment in the dense core": 15,
    "`found` as a name": 10,
    "`told`, `said`, `true` as names": 0,
    "other habits as names": 0,
    "words the glossary replaced, as names": 0,
    "phrases the glossary replaced, in texts": 0,
    "files on the path of one request": 10,
    "files on the path of one decoding step": 10,
}
"""Every bar: at most so many."""
