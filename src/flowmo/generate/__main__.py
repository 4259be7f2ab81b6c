"""``python -m flowmo.generate``: the same as ``flowmo generate``."""

import sys

from flowmo.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
