"""Tables and figures of the paper, each a recipe: ``python -m reproduce NAME --scale cpu --data … --held-out …``.

``runner.py`` says what a recipe is and runs it; ``page.py`` writes its table and plot.
"""

from flowmo.errors import FlowMoError

SCALES = ("smoke", "cpu", "gpu", "paper")
STUDIES = (
    *("ablations", "continuous", "posttrain", "distill", "variance", "noise", "sampler", "likelihood"),
    *("peer", "discriminator", "generate", "tokenizers", "passes", "timesteps"),
)


class StudyError(FlowMoError, RuntimeError):
    """A study cannot continue. The message says why."""
