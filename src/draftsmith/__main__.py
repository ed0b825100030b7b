"""`python -m draftsmith`, and what torchrun starts."""

import sys

from draftsmith.cli import main

sys.exit(main())
