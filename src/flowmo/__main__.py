"""``python -m flowmo``: the command line."""

import sys

from flowmo.cli import main

sys.exit(main())
