"""`python -m jaxprune`, the same as `jaxprune`."""

import sys

from jaxprune import cli

sys.exit(cli.main())
