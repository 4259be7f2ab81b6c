"""Each claim of the paper as a recipe that trains what it needs, measures, and writes a table and plots.

A study is a module with a ``TITLE``, ``SCALES`` by name, and ``run(scale, place)``, listed here.
"""

SCALES = ("smoke", "cpu", "gpu", "paper")
STUDIES = {"posttrain": "flowmo.studies.posttrain", "generate": "flowmo.studies.generate"}
