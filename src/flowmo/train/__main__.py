"""``python -m flowmo.train``: the same as ``python -m flowmo train``."""

import runpy
import sys

sys.argv.insert(1, "train")
runpy.run_module("flowmo", run_name="__main__")
