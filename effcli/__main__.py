"""`python -m effcli` is `effcli`."""

import sys

from effcli.cli import main

sys.exit(main())
