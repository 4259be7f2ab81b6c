"""``python -m flowmo.generate``: the same as ``python -m flowmo generate``."""

import runpy
import sys

sys.argv.insert(1, "generate")
runpy.run_module("flowmo", run_name="__main__")
