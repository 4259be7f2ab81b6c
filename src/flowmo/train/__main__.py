"""``python -m flowmo.train``: the same as ``flowmo train``."""

import sys

from flowmo.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
