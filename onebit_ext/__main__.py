"""`python -m onebit_ext` is `onebit-ext`."""

import sys

from .tools.cli import main

sys.exit(main())
