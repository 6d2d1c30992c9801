"""`python -m fluid_eval` is `fluid-eval`."""

import sys

from .cli.main import main

sys.exit(main())
