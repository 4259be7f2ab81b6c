"""Steps, shift, guidance, its interval, and solver (section 3.4, equation 14, appendix B).

Reproduces the paper's choice of ρ = 4 and 25 steps: trained models are sampled in many ways, each metric over the
decoder's passes.

Cost: smoke half a minute. cpu 45 minutes per model of 5 M parameters on two cores. gpu 15 minutes per model of 80 M
parameters on one H100, by arithmetic. paper a day per model of FlowMo-Lo's size on one H100, by arithmetic.
Expect: (written before the first run) the paper shows no curve. From one to eight steps every metric of distribution
improves, and PSNR falls. ρ = 4 is ahead of ρ = 1 by 1 dB at eight steps, as in the ablations, and by little at 16.
Guidance changes PSNR by less than 0.1 dB and is best in the Fréchet distance at 1.5. At equal passes, above four,
second-order solvers have a lower Fréchet distance and a lower PSNR than Euler's, for they follow the flow more closely.
The interval (written before its first run): a guidance of 2 from t = 0 to 1 takes 0.3 dB of PSNR more than within the
paper's 0.145 to 0.505; the upper end matters, the lower one does not. With whole last steps (written before their
first row): from one to 16 steps of ρ = 4 the Fréchet distance falls from 305 to 245 and PSNR from 18.3 to 15.0 dB.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flowmo.config import Config, SamplingConfig
from flowmo.model.sampler import network_passes
from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.runner import Results, Row, Rows, Scale, Study

TAKES_MODELS = True
SOLVERS = ("euler", "midpoint", "heun", "multistep")
RHOS, GUIDANCES = (1.0, 2.0, 4.0, 8.0), (1.0, 1.25, 1.5, 2.0, 3.0)
LOW_ENDS, HIGH_ENDS, INTERVAL_GUIDANCE = (0.0, 0.145), (0.25, 0.505, 0.75, 1.0), 2.0
"""Ends of guidance's interval, the paper's among them, and the guidance within."""
SHARED = {"high_ends": HIGH_ENDS, "solvers": SOLVERS}
AXES = {"shift": "passes", "guidance": "guidance", "interval": "high end of the interval", "solver": "passes"}
SCALES = {
    "smoke": Scale(steps=(1, 2), rhos=(1.0,), guidances=(1.5,), high_ends=(1.0,), solvers=("heun",), images=4),
    "cpu": Scale(steps=(1, 2, 4, 8, 16), rhos=RHOS[:3], guidances=GUIDANCES[:4], images=200, **SHARED),
    "gpu": Scale(steps=(1, 2, 4, 8, 16, 25), rhos=RHOS, guidances=GUIDANCES, images=1000, **SHARED),
    "paper": Scale(steps=(1, 2, 4, 8, 16, 25, 50), rhos=RHOS, guidances=GUIDANCES, images=5000, **SHARED),
}


class Setting(NamedTuple):
    """One way to sample: a point on the curve ``curve``, at ``x``, in the panels of ``part``."""

    part: str
    curve: str
    x: float
    sampling: SamplingConfig

    @property
    def label(self) -> str:
        s = self.sampling
        interval = f" in {s.guidance_low:g} to {s.guidance_high:g}" if self.part == "interval" else ""
        return f"{s.solver}, {s.sample_steps} steps, ρ = {s.rho:g}, guidance {s.guidance:g}{interval}"

    @property
    def name(self) -> str:
        s = self.sampling
        interval = f"-{s.guidance_low:g}to{s.guidance_high:g}" if self.part == "interval" else ""
        return f"{self.part}-{s.solver}-{s.sample_steps}-rho{s.rho:g}-g{s.guidance:g}{interval}"


def resampled(tokenizer: FlowMo, sampling: SamplingConfig) -> FlowMo:
    """Return a tokenizer with the same weights that samples in another way."""
    other, config = copy.copy(tokenizer), tokenizer.config
    other.config = replace(config, eval=replace(config.eval, sampling=sampling))
    return other


def settings_of(scale: Scale, config: Config) -> Iterator[Setting]:
    """Yield the ways to sample; with guidance only where training has taught the null code."""
    own, guided = config.eval.sampling, config.model.enable_cfg
    euler, most = replace(own, solver="euler"), max(scale.steps)
    for rho, steps in itertools.product(scale.rhos, scale.steps):
        sampling = replace(euler, rho=rho, sample_steps=steps)
        yield Setting("shift", f"ρ = {rho:g}", network_passes(sampling), sampling)
    for guidance in scale.guidances if guided else ():
        yield Setting("guidance", "guidance", guidance, replace(euler, sample_steps=most, guidance=guidance))
    for low, high in itertools.product(LOW_ENDS, scale.high_ends) if guided else ():
        ends = {"guidance_low": low, "guidance_high": high}
        sampling = replace(euler, sample_steps=most, guidance=INTERVAL_GUIDANCE, **ends)
        yield Setting("interval", f"guidance {INTERVAL_GUIDANCE:g} from t = {low:g}", high, sampling)
    for solver, steps in itertools.product(scale.solvers, scale.steps):
        sampling = replace(own, solver=solver, sample_steps=steps, guidance=1.0)
        yield Setting("solver", solver, network_passes(sampling), sampling)


def rows(study: Study, metadata: Row) -> Rows:
    for _, name, tokenizer in study.load_models(distilled=False):
        for setting in settings_of(SCALES[study.scale], tokenizer.config):
            run = f"{name}-{setting.name}"
            about = {"model": name, "part": setting.part, "curve": setting.curve, "arm": run, "label": setting.label}
            about |= {"passes": network_passes(setting.sampling), "x": setting.x}
            sampled = resampled(tokenizer, setting.sampling)
            yield {**study.once(run, partial(study.measure, sampled, SCALES[study.scale].images)), **about}


def body(results: Results, plot: Path) -> str:
    parts = page.groups_of(page.groups_of(results["rows"], "model")[0], "part")
    columns = page.measured(results["rows"])
    panels = [page.panel(column, rows, "x", AXES[rows[0]["part"]], log=2) for column in columns for rows in parts]
    page.line_plots(panels, len(parts), plot)
    first = {"model": "model", "sampler": "label", "passes": "passes"}
    return f"""\
The same weights, sampled in other ways. Means on {results["pictures"]} held-out images. passes: of the decoder, per
image. The plot shows the first model. {page.feature_note(results)}

{page.table(page.groups_of(results["rows"]), columns, first=first)}"""
