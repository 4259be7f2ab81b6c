"""Tables of a page, filled from ``results.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowmo.checkpoint.files import write_content
from flowmo.errors import FlowMoError

BEGIN, END = "<!-- one_gpu: begin -->", "<!-- one_gpu: end -->"


def fill_table(results: Path, page: Path) -> None:
    """Replace what lies between the two marks of a page.

    Raises:
        FlowMoError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise FlowMoError(f"{page} has no lines {BEGIN} and {END} to write between.")
    content = tables(json.loads(results.read_text(encoding="utf-8")))
    write_content(page, f"{before}{BEGIN}\n{content}\n{END}{after}")


def number(value: Any, form: str = "{:.3g}") -> str:
    return "–" if value is None else form.format(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: dict[str, Any]) -> str:
    """All tables as Markdown. A part that has not run is left out."""
    parts = [describe(results)]
    measured = results.get("measure", {}).get("rows", [])
    training = [row for row in measured if "microbatch" in row]
    if training:
        parts.append(
            table(
                ["training step", "micro-batch", "images/s", "matrix rate", "GiB", "forecast", "first step, s"],
                [
                    [
                        row["name"],
                        str(row["microbatch"]),
                        number(row["images_per_second"]),
                        number(row["matrix_share"], "{:.0%}"),
                        number(row["memory_gib"]),
                        number(row["predicted_gib"]),
                        number(row["first_step_seconds"]),
                    ]
                    for row in training
                ],
            )
        )
    inference = [row for row in measured if "part" in row]
    if inference:
        parts.append(
            table(
                ["inference", "part", "images/s", "matrix rate"],
                [
                    [row["name"], row["part"], number(row["images_per_second"]), number(row["matrix_share"], "{:.0%}")]
                    for row in inference
                ],
            )
        )
    unmeasured = [row["name"] for row in measured if "traceback" in row] + results.get("measure", {}).get(
        "left_out", []
    )
    if unmeasured:
        parts.append(f"Not measured: {'; '.join(unmeasured)}.")
    evaluated = results.get("finish", {}).get("rows", [])
    if evaluated:
        columns = {
            "bits_per_pixel": "{:.4f}",
            "psnr": "{:.2f}",
            "ssim": "{:.3f}",
            "lpips_alex": "{:.3f}",
            "lpips_vgg": "{:.3f}",
        }
        parts.append(
            table(
                ["steps", "held-out images", "bits per pixel", "PSNR", "SSIM", "LPIPS AlexNet", "LPIPS VGG"],
                [
                    [
                        str(row["steps"]),
                        str(row["images"]),
                        *(number(row[name], form) for name, form in columns.items()),
                    ]
                    for row in evaluated
                ],
            )
        )
    return "\n\n".join(parts)


def describe(results: dict[str, Any]) -> str:
    """Device, versions and training in sentences."""
    known = next((results[part] for part in ("measure", "train", "check", "finish") if part in results), {})
    about = results.get("run", {})
    code = about.get("commit") or f"sources {about.get('sources')}"
    lines = [f"{known.get('device')}, torch {known.get('torch')}, {code}."]
    if known.get("dry_run"):
        lines.append("This is a dry run in little: no number here means anything.")
    rates = results.get("measure", {}).get("matrix_rates")
    if rates:
        shown = (("bfloat16", "bfloat16"), ("tf32", "TF32"), ("float32", "float32"))
        lines.append(
            "Matrix rate: " + ", ".join(f"{rates[f'{k}_tflops']:.3g} TFLOP/s in {name}" for k, name in shown) + "."
        )
    check = results.get("check", {})
    if "passed" in check:
        lines.append(f"tests/gpu: {check['passed']} passed, {check['failed']} failed, {check['skipped']} skipped.")
    train = results.get("train", {})
    if "train_seconds" in train:
        lines.append(
            f"Training: {train['images']:,} images in {train['train_seconds'] / 60:.1f} minutes, "
            f"{train['images_per_second']:.4g} a second, from {train.get('images_in_packs', 0):,} photographs."
        )
    return " ".join(lines)
