"""Continuous bottlenecks (section 4.1, table 3).

Reproduces table 3's question at DiTo's latent size: one tokenizer per bottleneck and seed, with LayerNorm and noise
synchronization (DiTo's), KL, and none. Beside them trains DiTo's recipe (Chen et al. 2025, arXiv 2501.18593): a
convolutional encoder and decoder, the same LayerNorm code, and the flow's L2 loss alone, at uniform timesteps.

Cost: smoke a quarter of a minute. cpu an hour on one core, by arithmetic. gpu 20 minutes on one H100, by arithmetic at
a fifth of its peak. paper 197 hours per row on 8 H100, by arithmetic at 40 % of their peak.
Expect: (written before the first run) the paper's FlowMo is better than DiTo in every metric. After one epoch DiTo's
recipe is ahead in PSNR, for it starts with convolutions, and behind in both LPIPS and the Fréchet distance, for it
has no perceptual loss.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flowmo.config import Config
from flowmo.evaluate.published import TABLE_3
from flowmo.tokenizer import FlowMo
from reproduce import page
from reproduce.bases import GPU_LONG, PAPER_LO, SMOKE_ABLATION, TINY_BASE
from reproduce.runner import Results, Row, Rows, Scale, Study

BOTTLENECKS = {
    "layernorm": "LayerNorm and noise synchronization (DiTo's)",
    "kl": "KL",
    "noop": "none",
}
DITO = (
    *("model.quantization_type=layernorm", "model.network=windowed", "model.patch_size=16", "model.enable_cfg=false"),
    *("model.prediction=velocity", "opt.lpips_weight=0", "opt.anchor=0", "opt.schedule=uniform"),
    *("opt.loss_space=velocity", "eval.sampling.rho=1", "eval.sampling.guidance=1"),
    *("opt.freeze_encoder_after=1000 epochs", "model.fix_initial_norms=false"),
)
"""DiTo's recipe. Our decoder of this kind mixes convolutions with attention in windows."""
HEAD = 64
"""Channels of its attention heads."""
CONTINUOUS = "model.quantization_type=layernorm"
SCALES = {
    "smoke": Scale(base=SMOKE_ABLATION.override(CONTINUOUS, "model.context_dim=4"), images=4),
    "cpu": Scale(  # as much code per pixel as DiTo's
        base=TINY_BASE.override(CONTINUOUS, "model.code_length=16", "model.context_dim=16"), seeds=2, images=300
    ),
    "gpu": Scale(base=GPU_LONG.override(CONTINUOUS, "model.context_dim=16"), seeds=2, images=1000),
    "paper": Scale(base=PAPER_LO.override(CONTINUOUS, "model.context_dim=16"), images=50_000),
}


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    model = scale.base.model
    metadata |= {"code_length": model.code_length, "context_dim": model.context_dim}
    metadata["side"] = scale.base.data.image_size
    for seed in range(1, scale.seeds + 1):
        arms = {kind: (label, (f"model.quantization_type={kind}",)) for kind, label in BOTTLENECKS.items()}
        arms["dito"] = ("DiTo's recipe", dito_settings(scale.base))
        for kind, (label, settings) in arms.items():
            run = f"{kind}-seed{seed}"
            config = scale.base.override(*settings, f"trainer.seed={seed}")
            row = study.trained_row(run, config, scale.images, arm=kind, label=label, seed=seed)
            study.delete_checkpoints(run)
            metadata["images"] = row["images"]
            yield row


def dito_settings(base: Config) -> tuple[str, ...]:
    """DiTo's recipe at the width whose parameters are nearest to those of the base."""

    def at(width: int) -> tuple[str, ...]:
        heads = width // HEAD
        widths = (f"model.hidden_size={width}", f"model.enc_hidden_size={width}")
        return (*DITO, *widths, f"model.num_heads={heads}", f"model.enc_num_heads={heads}")

    def parameters(config: Config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in FlowMo(config).parameters())

    goal = parameters(base)
    width = min(range(HEAD, 2048, HEAD), key=lambda width: abs(parameters(base.override(*at(width))) - goal))
    return at(width)


def body(results: Results, plot: Path) -> str:
    groups = page.groups_of(results["rows"])
    columns = page.measured(results["rows"])
    page.dot_plots([groups], columns, plot)
    published = page.markdown_table(
        ["table 3", "rFID ↓", "PSNR ↑", "SSIM ↑", "LPIPS ↓"],
        ([row.name, *(f"{value:g}" for value in (row.rfid, row.psnr, row.ssim, row.lpips))] for row in TABLE_3),
    )
    return f"""\
One tokenizer per bottleneck and seed, each trained on {results["images"]} images: {results["code_length"]} tokens of
{results["context_dim"]} channels for {results["side"]} × {results["side"]} pixels. Means ± standard deviations over
seeds, on {results["pictures"]} held-out images. {page.feature_note(results)} s: median seconds of training.

{page.table(groups, columns, last=page.SECONDS)}
The paper's, on ImageNet at 256 × 256 with 256 tokens of 16 channels:

{published}
"""
