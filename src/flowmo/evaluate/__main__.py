"""``python -m flowmo.evaluate``: the same as ``python -m flowmo evaluate``."""

import runpy
import sys

sys.argv.insert(1, "evaluate")
runpy.run_module("flowmo", run_name="__main__")
