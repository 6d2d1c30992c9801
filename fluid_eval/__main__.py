"""`python -m fluid_eval` is `fluid-eval`."""

import sys

from .cli import main

sys.exit(main())
