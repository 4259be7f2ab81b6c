"""``python -m flowmo.evaluate``: the same as ``flowmo evaluate``."""

import sys

from flowmo.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
