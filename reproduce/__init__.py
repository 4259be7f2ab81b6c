"""Each claim of the paper as a recipe that trains what it needs, measures, and writes a table and plots.

A study is a module with a ``TITLE``, ``SCALES`` by name, ``run(place, judges)`` and ``draw(place)``, listed here.
"""

SCALES = ("smoke", "cpu", "gpu", "paper")
STUDIES = {
    name: f"reproduce.{name}"
    for name in (
        *("ablations", "continuous", "posttrain", "distill", "variance", "noise", "sampler", "likelihood"),
        *("peer", "generate", "tokenizers"),
    )
}
