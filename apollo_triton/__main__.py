"""``python -m apollo_triton`` is the console script ``apollo-triton``."""

import sys

from .cli import main

sys.exit(main())
