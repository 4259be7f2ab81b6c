"""Steps, shift, guidance and solver (section 3.4, equation 14).

Reproduces the paper's choice of ρ = 4 and 25 steps: trained models are sampled in many ways, each metric over the
decoder's passes.

Cost: smoke half a minute. cpu half an hour per model of 5 M parameters on two cores. gpu 15 minutes per model of 80 M
parameters on one H100, by arithmetic. paper a day per model of FlowMo-Lo's size on one H100, by arithmetic.
Expect: (written before the first run) the paper shows no curve. From one to eight steps every metric of distribution
improves, and PSNR falls. ρ = 4 is ahead of ρ = 1 by 1 dB at eight steps, as in the ablations, and by little at 16.
Guidance changes PSNR by less than 0.1 dB and is best in the Fréchet distance at 1.5. At equal passes, above four,
second-order solvers have a lower Fréchet distance and a lower PSNR than Euler's, for they follow the flow more closely.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flowmo.config import Config
from flowmo.model.sampler import network_passes
from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.runner import Results, Row, Rows, Scale, Study

TAKES_MODELS = True
SOLVERS = ("euler", "midpoint", "heun", "multistep")
RHOS, GUIDANCES = (1.0, 2.0, 4.0, 8.0), (1.0, 1.25, 1.5, 2.0, 3.0)
SCALES = {
    "smoke": Scale(steps=(1, 2), rhos=(1.0,), guidances=(1.5,), solvers=("heun",), images=4),
    "cpu": Scale(steps=(1, 2, 4, 8, 16), rhos=RHOS[:3], guidances=GUIDANCES[:4], solvers=SOLVERS, images=200),
    "gpu": Scale(steps=(1, 2, 4, 8, 16, 25), rhos=RHOS, guidances=GUIDANCES, solvers=SOLVERS, images=1000),
    "paper": Scale(steps=(1, 2, 4, 8, 16, 25, 50), rhos=RHOS, guidances=GUIDANCES, solvers=SOLVERS, images=5000),
}


class Setting(NamedTuple):
    """One way to sample: a point of a curve of panel ``part`` (shift, guidance or solver)."""

    part: str
    steps: int
    rho: float
    guidance: float
    solver: str = "euler"

    def passes(self, config: Config) -> int:
        """Decoder passes per image, including those for guidance."""
        return network_passes(self.changed(config).eval.sampling)

    def apply(self, tokenizer: FlowMo) -> FlowMo:
        """Return a tokenizer with the same weights that samples in this way."""
        other = copy.copy(tokenizer)
        other.config = self.changed(tokenizer.config)
        return other

    def changed(self, config: Config) -> Config:
        values = {"sample_steps": self.steps, "rho": self.rho, "guidance": self.guidance, "solver": self.solver}
        return config.updated({f"eval.sampling.{name}": value for name, value in values.items()})


def settings_of(scale: Scale, config: Config) -> Iterator[Setting]:
    own = config.eval.sampling
    for rho, steps in itertools.product(scale.rhos, scale.steps):
        yield Setting("shift", steps, rho, own.guidance)
    for guidance in scale.guidances:
        yield Setting("guidance", max(scale.steps), own.rho, guidance)
    for solver, steps in itertools.product(scale.solvers, scale.steps):
        yield Setting("solver", steps, own.rho, 1.0, solver)


def rows(study: Study, metadata: Row) -> Rows:
    for _, name, tokenizer in study.load_models(distilled=False):
        for s in settings_of(SCALES[study.scale], tokenizer.config):
            run = f"{name}-{s.part}-{s.solver}-{s.steps}-rho{s.rho:g}-g{s.guidance:g}"
            yield study.once(run, partial(measure, s, run, name, tokenizer, study))


def measure(s: Setting, arm: str, model: str, tokenizer: FlowMo, study: Study) -> Row:
    curve = {"shift": f"ρ = {s.rho:g}", "guidance": "guidance", "solver": s.solver}[s.part]
    label = f"{s.solver}, {s.steps} steps, ρ = {s.rho:g}, guidance {s.guidance:g}"
    about = {"model": model, "part": s.part, "curve": curve, "arm": arm, "label": label}
    about |= {"passes": s.passes(tokenizer.config), "guidance": s.guidance}
    return {**about, **study.measure(s.apply(tokenizer), SCALES[study.scale].images)}


def body(results: Results, plot: Path) -> str:
    parts = page.groups_of(page.groups_of(results["rows"], "model")[0], "part")
    columns, x = page.measured(results["rows"]), {"shift": "passes", "guidance": "guidance", "solver": "passes"}
    panels = [page.panel(column, rows, x[rows[0]["part"]], log=2) for column in columns for rows in parts]
    page.line_plots(panels, len(parts), plot)
    first = {"model": "model", "sampler": "label", "passes": "passes"}
    return f"""\
The same weights, sampled in other ways. Means on {results["pictures"]} held-out images. passes: of the decoder, per
image. The plot shows the first model. {page.feature_note(results)}

{page.table(page.groups_of(results["rows"]), columns, first=first)}"""
