"""`python -m cluster` is `stormjib`."""

import sys

from cluster.cli import main

sys.exit(main())
