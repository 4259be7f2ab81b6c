"""What one generator draws from the ids of several tokenizers (table 2).

Reproduces table 2's question with all else equal. Compares a FlowMo after stage 1A, the same one after stage 1B, and a
convolutional, adversarial tokenizer with the bits, parameters and training FLOPs of stage 1A. The same MaskGIT learns
the ids of each from several seeds. What it draws is compared with the training images, beside the tokenizer's own
reconstructions.

Cost: smoke half a minute. cpu an hour and a half on one core. gpu 25 minutes on one H100, by arithmetic. paper two
tokenizers of 1600 hours on one H100 and three generators of 350 hours, by arithmetic at 40 % of its peak.
Expect: stage 1B improves what is drawn; at scale cpu, the convolutional tokenizer stays ahead in Fréchet distance.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from flowmo.config import preset
from flowmo.train.state import read_metadata
from reproduce import generation, page
from reproduce.adversarial import train_peer
from reproduce.bases import CPU_GENERATOR, GPU_GENERATOR, GPU_LONG, PAPER_LO, SMOKE_ABLATION, SMOKE_GENERATOR, TINY_LONG
from reproduce.peer import match
from reproduce.posttrain import DISTANCE
from reproduce.runner import Results, Row, Rows, Scale, Study

KINDS = {
    "pretrained": "FlowMo, stage 1A alone",
    "posttrained": "FlowMo, stages 1A and 1B",
    "convolutional": "convolutional, adversarial",
}
BITS = page.Column("cross_entropy", "bits to predict a masked id ↓", 2, 1 / math.log(2))
CPU = CPU_GENERATOR.override("trainer.duration=19200 images")
GPU = GPU_GENERATOR.override("generator.depth=8", "trainer.duration=500k images")
STAGE_1B = ("opt.lr=1e-4", "model.ema_decay=0.987")
PAPER_STAGE_1B = ("opt.lr=5e-5", "data.global_batch_size=64")
"""Stage 1B in appendix A.2."""
SCALES = {
    "smoke": Scale(
        **{"base": SMOKE_ABLATION, "peer_rate": 1e-3, "posttraining": 4, "stage_1b": STAGE_1B},
        **{"generator": SMOKE_GENERATOR, "steps": 2, "images": 6},
    ),
    "cpu": Scale(
        **{"base": TINY_LONG, "peer_rate": 2e-3, "posttraining": 2048, "stage_1b": STAGE_1B},
        **{"generator": CPU, "steps": 12, "images": 300, "seeds": 2},
    ),
    "gpu": Scale(
        **{"base": GPU_LONG, "peer_rate": 1e-3, "posttraining": 16384, "stage_1b": STAGE_1B},
        **{"generator": GPU, "steps": 64, "images": 2000, "seeds": 2},
    ),
    "paper": Scale(
        **{
            "base": PAPER_LO.override("data.max_microbatch=32"),
            "peer_rate": 1e-4,
            "posttraining": 1_281_167,
            "stage_1b": PAPER_STAGE_1B,
        },
        **{"generator": preset("uvit"), "steps": 64, "images": 50_000},
    ),
}
"""``base`` is the FlowMo, ``peer_rate`` the peer's learning rate; stage 1B sees ``posttraining`` images; ``seeds`` are
the generator's."""
POSTTRAINED = (
    *("model.posttrain_sample=true", "opt.freeze_encoder_after=0", "opt.warmup=0", "opt.cooldown=0"),
    *(f"opt.lpips_mode={DISTANCE}", "opt.lpips_weight=0.01"),
)
"""Stage 1B as in the recipe ``posttrain``, at the paper's weight. A scale's ``stage_1b`` adds to it."""


def rows(study: Study, metadata: Row) -> Rows:
    scale = SCALES[study.scale]
    evaluator = generation.GenerationEvaluator(study, scale.images, scale.base.data.image_size)
    equal = match(scale.base, study)
    metadata |= {"steps": scale.steps, "posttraining": scale.posttraining, "match": equal}
    metadata |= {"bits_per_picture": scale.base.bits_per_image, "side": scale.base.data.image_size}
    metadata |= {**evaluator.metadata(scale.generator), "rates": [scale.base.opt.lr, scale.peer_rate]}
    for kind, label in KINDS.items():
        tokenizer = train_tokenizer(kind, equal, study)
        about = {"arm": kind, "tokenizer": tokenizer.identity()}
        make = partial(generation.reconstructions, tokenizer, evaluator)
        yield evaluator.once(f"{kind}-reconstructed", label, make, kind="reconstructed", **about)
        tokens, labels = generation.make_tokens(tokenizer, kind, study), evaluator.balanced_labels()
        for seed in range(1, scale.seeds + 1):
            run, config = f"{kind}-generator-seed{seed}", scale.generator.override(f"trainer.seed={seed}")
            generator, nats = generation.train_generator(config, run, tokens)
            make = partial(generation.generated, generator, tokenizer, labels, study, seed, steps=scale.steps)
            yield evaluator.once(run, label, make, kind="generated", seed=seed, cross_entropy=nats, **about)


def train_tokenizer(kind: str, equal: Row, study: Study) -> generation.Tokenizer:
    scale = SCALES[study.scale]
    if kind == "convolutional":
        duration = f"trainer.duration={equal['images']['convolutional']} images"
        peer, _ = train_peer(scale.base.override(f"opt.lr={scale.peer_rate}", duration), equal["width"], kind, study)
        return peer.eval().requires_grad_(False)
    checkpoint = study.train(scale.base, "pretrained").checkpoint
    if kind == "posttrained":
        duration = f"trainer.duration={read_metadata(checkpoint)['images'] + scale.posttraining} images"
        checkpoint = study.train(
            scale.base.override(*POSTTRAINED, *scale.stage_1b, duration), kind, checkpoint
        ).checkpoint
    return study.load(checkpoint)


def body(results: Results, plot: Path) -> str:
    by_kind = {rows[0]["kind"]: page.groups_of(rows) for rows in page.groups_of(results["rows"], "kind")}
    drawn, columns = by_kind.get("generated", []), page.measured(results["rows"], generation.COLUMNS)
    page.dot_plots([drawn or by_kind["reconstructed"]], [*columns, BITS], plot)
    network, equal, rates = results["generator"], results["match"], results["rates"]
    sizes = [
        [
            KINDS[kind],
            f"{equal['parameters'][of] / 1e6:.2f}",
            f"{equal['flops'][of] / 1e12:.0f}",
            f"{equal['images'][of]}",
        ]
        for kind, of in (("pretrained", "flowmo"), ("convolutional", "convolutional"))
    ]
    return f"""\
{results["bits_per_picture"]:g} bits per image of {results["side"]} × {results["side"]} pixels, of one bottleneck.
Learning rates: FlowMo {rates[0]:g}, its peer {rates[1]:g}; at scale `cpu` the recipe `peer` chose them.

{page.markdown_table(("tokenizer", "M parameters", "TFLOP of training", "images"), sizes)}
Stage 1B: {results["posttraining"]} more images, for the decoder alone. Generators of {network["depth"]} blocks of width
{network["hidden_size"]}, all trained alike on the ids of IMAGES and their mirror images; the checkpoint that predicts
the ids of HELD_OUT best; {results["steps"]} steps per image; the preset's temperatures, guidance and order. Means ±
standard deviations over seeds of the generator; each tokenizer was trained once. {generation.page_note(results)}

Reconstructions of the training images:

{page.table(by_kind["reconstructed"], columns, first={"": "label"})}
Images that generators draw:

{page.table(drawn, [*columns, BITS])}
{"".join(page.comparison(group, drawn[0], columns) for group in drawn[1:])}"""
