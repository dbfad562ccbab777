"""`python -m scmini`."""

import sys

from scmini.cli import main

sys.exit(main())
