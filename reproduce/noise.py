"""The scale of the start noise (appendix C, figure 9).

Reproduces rate, distortion and perception over the scale of the noise that samples start from. Noise scaled below 1 is
likelier under N(0, I), and so are the samples, up to the flow's Jacobian.

Cost: smoke half a minute. cpu 40 minutes per seed on one core. gpu 25 minutes on one H100, by arithmetic. paper 3 hours
per model of FlowMo-Lo's size on one H100, by arithmetic; give --models of several rates.
Expect: less noise raises PSNR and worsens LPIPS at every rate; no scale is best in both PSNR and Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.bases import GPU_SHORT, SMOKE_ABLATION, TINY_BASE
from reproduce.page import Column, Group
from reproduce.runner import Results, Row, Rows, Scale, Study

SCALES = {
    "smoke": Scale(base=SMOKE_ABLATION, scales=(0.8, 1.0), images=4),
    "cpu": Scale(base=TINY_BASE, seeds=2, scales=(0.6, 0.8, 1.0, 1.1), images=100),
    "gpu": Scale(base=GPU_SHORT, seeds=2, scales=(0.6, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1), images=1000),
    "paper": Scale(scales=(0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05), images=5000),
}


def tokenizers(study: Study) -> Iterator[tuple[str, int, FlowMo]]:
    """Yield name, seed and tokenizer: ``--models`` at scale paper, else a third, all and twice the baseline's bits."""
    if study.scale == "paper":
        yield from ((name, 0, tokenizer) for _, name, tokenizer in study.load_models())
        return
    scale = SCALES[study.scale]
    own = scale.base.model.context_dim
    for seed in range(1, scale.seeds + 1):
        for channels in (own // 3, own, 2 * own):
            run = f"bits{channels}-seed{seed}"
            group = f"model.codebook_size_for_entropy={min(channels, 9)}"
            config = scale.base.override(f"model.context_dim={channels}", group, f"trainer.seed={seed}")
            yield run, seed, study.load(study.train(config, run).checkpoint)


def rows(study: Study, metadata: Row) -> Rows:
    if study.scale == "paper":
        metadata["models"] = list(study.models)
    for name, seed, tokenizer in tokenizers(study):
        if tokenizer.config.bits_per_pixel is None:
            study.report(f"{name} is skipped: it is continuous and has no rate.")
            continue
        for noise in SCALES[study.scale].scales:
            model = f"{name}, " if study.scale == "paper" else ""  # models of one rate are no seeds of one another
            yield study.once(f"{name}-noise{noise:g}", partial(measure, tokenizer, seed, noise, study, model))


def measure(tokenizer: FlowMo, seed: int, noise: float, study: Study, model: str = "") -> Row:
    rate = f"{model}{tokenizer.config.bits_per_pixel:.4g} bits per pixel"
    about = {"arm": f"{rate}, {noise:g}", "label": f"{rate}, scale {noise:g}", "seed": seed, "rate": rate}
    return {**about, "noise": noise, **study.measure(tokenizer, SCALES[study.scale].images, noise)}


def body(results: Results, plot: Path) -> str:
    rates, columns = page.groups_of(results["rows"], "rate"), page.measured(results["rows"])
    draw(rates, next((c for c in columns if c.key == "frechet_distance"), columns[0]), plot)
    return f"""\
The same tokenizers, with the noise that samples start from scaled. Means ± standard deviations over seeds, on
{results["pictures"]} held-out images. {page.feature_note(results)}

{page.table(page.groups_of(results["rows"]), columns)}
{verdict(rates, columns)}"""


def verdict(rates: Sequence[Group], columns: Sequence[Column]) -> str:
    """The best scale of every rate and metric, and its gain over scale 1."""
    lines = []
    for rate in rates:
        by_scale = {group[0]["noise"]: group for group in page.groups_of(rate, "noise")}
        for column in columns:
            means = {scale: mean for scale, group in by_scale.items() if (mean := column.mean(group)) is not None}
            best = max(means, key=lambda scale: column.sign * means[scale], default=1.0)
            change = page.gain(by_scale[best], by_scale.get(1.0, []), column, paired=True)
            if change is not None:
                word = "1 itself" if best == 1 else f"{best:g}, which {page.relation(change, '1', column)}"
                lines.append(f"- {rate[0]['rate']}, {column.name}: the best scale is {word}.\n")
    return "".join(lines)


def draw(rates: Sequence[Group], perception: Column, plot: Path) -> None:
    psnr = page.METRICS[0]
    panel = page.Panel(f"{perception.heading} over {psnr.heading}", psnr.heading, notes=True)
    for rate in rates:
        points = [(psnr.mean(g), perception.mean(g), g[0]["noise"]) for g in page.groups_of(rate, "noise")]
        panel.curves[rate[0]["rate"]] = [point for point in points if None not in point]
    page.line_plots([panel], 1, plot)
