"""``python -m fusedpo``: the same as the ``fusedpo`` command."""

import sys

from fusedpo.cli import main

sys.exit(main())
