"""Draw a run's curve and say where it will end.

    python runs/curve.py RUN/metrics.jsonl [OTHER/metrics.jsonl ...] --until 2000000 --out curve.png

Fits metric = a + b · images^(−c) to every metric of the first run with at least four points, and prints its value at
``--until`` images. The training loss is averaged over ten parts of equal ratio, after ``--skip`` images. A power law
describes a constant learning rate; a cooldown at the end gains on top. The exponent c is limited to 0.05 … 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from flowmo.train.logging import read_metrics

METRICS = {"held_out_psnr": "held-out PSNR (dB)", "held_out_distance": "held-out LPIPS", "loss": "training loss"}
EXPONENTS = np.linspace(0.05, 1, 96)
FEWEST = 4
PARTS = 10


def read(path: Path, metric: str, skip: float) -> tuple[np.ndarray, np.ndarray]:
    """Images and values of a metric after ``skip`` images; the training loss as means over parts of equal ratio."""
    points = [(row["images"], row[metric]) for row in read_metrics(path) if metric in row and row["images"] > skip]
    images, values = np.array(points, dtype=float).reshape(-1, 2).T
    if metric.startswith("held_out") or len(values) < 2 * FEWEST:
        return images, values
    part = np.digitize(images, np.geomspace(images[0], images[-1], PARTS + 1)[1:-1])
    means = [(images[part == i].mean(), values[part == i].mean()) for i in range(PARTS) if (part == i).any()]
    return np.array([mean[0] for mean in means]), np.array([mean[1] for mean in means])


def fit(images: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """a, b and c of ``a + b · images^(−c)`` by least squares: linear in a and b, searched over c."""
    best = None
    for exponent in EXPONENTS:
        terms = np.stack([np.ones_like(images), images**-exponent], axis=1)
        solution, *_ = np.linalg.lstsq(terms, values, rcond=None)
        error = float(np.square(terms @ solution - values).sum())
        if best is None or error < best[0]:
            best = error, float(solution[0]), float(solution[1]), float(exponent)
    assert best is not None
    return best[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--until", type=float, default=2e6)
    parser.add_argument("--skip", type=float, default=4800, help="images at the start to leave out (4800, the warm-up)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figure_axes = None
    if arguments.out:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        figure_axes = figure.subplots(1, len(METRICS))
    for column, (metric, name) in enumerate(METRICS.items()):
        for number, path in enumerate(arguments.logs):
            images, values = read(path, metric, arguments.skip)
            if not len(values):
                continue
            if figure_axes is not None:
                figure_axes[column].plot(images, values, "o-", markersize=3, label=path.parent.name)
            if number == 0 and len(values) >= FEWEST:
                a, b, c = fit(images, values)
                end = a + b * arguments.until**-c
                print(f"{name}: {a:.4f} + {b:.4g} · images^-{c:.2f}; at {arguments.until:,.0f} images {end:.4f}")
                if figure_axes is not None:
                    ahead = np.geomspace(images[0], arguments.until, 100)
                    figure_axes[column].plot(ahead, a + b * ahead**-c, "--", linewidth=1, label="power law")
        if figure_axes is not None:
            figure_axes[column].set(xscale="log", xlabel="images", ylabel=name)
            figure_axes[column].grid(alpha=0.3)
    if figure_axes is not None:
        figure_axes[0].legend(fontsize=8)
        figure.savefig(arguments.out, dpi=100)


if __name__ == "__main__":
    main()
