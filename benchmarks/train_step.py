"""Speed, memory and FLOP utilisation of whole training steps: loss, gradients, Adam, norm control, EMA.

    python benchmarks/train_step.py                                             # nano on a CPU
    python benchmarks/train_step.py --device cuda --presets small lo --compile  # on one large GPU

Pictures are noise and the perceptual network's weights are random, which changes no time. The microbatch is the
largest power of two that the memory holds by arithmetic, at most ``--most``, and is halved where that was too much.
Every row gives what ``flowmo info PRESET --training`` predicted beside what was measured, and the perceptual network's
share of a step, which is timed again without it. On a CPU the memory is the most that this process has ever held, so
only the first row of a call shows it. Stage 1B: ``model.posttrain_sample=true opt.lpips_mode=resnet``.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

import flowmo
from flowmo.config import Config
from flowmo.data.tokens import Vocabulary
from flowmo.distributed import World
from flowmo.evaluate.speed import peak_flops, timed
from flowmo.generate.generator import Generator
from flowmo.losses.noise import TrainingNoise
from flowmo.losses.perceptual import build_distance
from flowmo.losses.stages import Stage
from flowmo.train.cost import Memory, training_flops, training_memory
from flowmo.train.ema import EMA
from flowmo.train.generator import GeneratorNoise, GeneratorStage
from flowmo.train.memory import machine_memory, used_memory
from flowmo.train.optimizer import NormControl, build_optimizers, clip_gradients
from flowmo.train.parallel import KEPT, prepare
from flowmo.train.task import in_bfloat16

PAPER_VOCABULARY = Vocabulary(
    tokenizer="0" * 16, model="lo", image_size=256, tokens=256, sub_tokens=2, id_bits=9, classes=("class",) * 1000
)
"""Ids of FlowMo-Lo and the classes of ImageNet, for stage 2."""


def build(config: Config, device: torch.device) -> tuple[nn.Module, nn.Module, Callable[[nn.Module, int, int], Tensor]]:
    """The model of the settings, its stage, and the loss of a batch: (stage, first index, images) -> scalar."""
    torch.manual_seed(0)
    if config.generator.train:
        with device:
            generator = Generator(config, PAPER_VOCABULARY)

        def guess(stage: nn.Module, first: int, batch: int) -> Tensor:
            draws = GeneratorNoise.of(config, PAPER_VOCABULARY.ids, range(first, first + batch), device)
            ids = torch.zeros(batch, PAPER_VOCABULARY.ids, dtype=torch.int64, device=device)
            return stage(ids, ids[:, 0], draws.mask).loss

        return generator, prepare(GeneratorStage(generator), World(device=device), config.trainer), guess
    with device:  # a large model's weights are drawn for seconds on a CPU
        tokenizer = flowmo.FlowMo(config)
        perceptual = build_distance(config.opt.lpips_mode, pretrained=False) if config.opt.lpips_weight else None
    tokenizer.encoder.requires_grad_(config.stage == "pretrain")
    side = config.data.image_size

    def reconstruct(stage: nn.Module, first: int, batch: int) -> Tensor:
        images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
        draws = TrainingNoise.of(config, images, range(first, first + batch))
        return stage(images, draws, freeze_encoder=config.stage != "pretrain").loss

    return (
        tokenizer,
        prepare(Stage(tokenizer, config.opt, perceptual), World(device=device), config.trainer),
        reconstruct,
    )


def measure(config: Config, device: torch.device, batch: int, steps: int) -> dict[str, float]:
    """Images a second (median step after two that warm up), seconds of the first step, and most bytes held."""
    gc.collect()  # compiled and recomputing blocks are reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch._dynamo.reset()  # a second size would be compiled for any size
    model, stage, loss_of = build(config, device)
    optimizers, average = build_optimizers(model), EMA(model, batch)
    norms = NormControl({} if config.generator.train else model.networks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step(number: int) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(config, device)):
            loss = loss_of(stage, number * batch, batch)
        loss.backward()
        clip_gradients(model.parameters(), config.opt.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        norms.apply(torch.ones((), device=device))
        average.update(number)

    times = [timed(partial(step, number), device) for number in range(steps + 2)]
    rest = sorted(times[2:])
    median = rest[len(rest) // 2]
    return {
        "images_per_second": batch / median,
        "slowest_over_median": rest[-1] / median,
        "first_step_seconds": times[0],
        "memory_gib": used_memory(device) / 2**30,
    }


def forecast(config: Config) -> tuple[float, Memory]:
    """FLOPs and memory by arithmetic, of any stage."""
    config = config.override("trainer.compile=false")  # counts alike, and is remembered
    vocabulary = PAPER_VOCABULARY if config.generator.train else None
    return training_flops(config, vocabulary=vocabulary), training_memory(config, vocabulary=vocabulary)


def measure_largest(config: Config, device: torch.device, most: int, steps: int) -> dict[str, float] | None:
    """``measure`` at the largest power of two that fits, at most ``most``, beside the forecast of its memory.

    The first try follows the forecast; the batch is halved while it does not fit. ``None`` if nothing fits.
    """
    flops, expected = forecast(config.override(f"trainer.enable_bfloat16={str(in_bfloat16(config, device)).lower()}"))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine_memory()
    batch = 2 ** (min(expected.max_images(memory), most).bit_length() - 1)
    while batch:
        measured = None
        with suppress(torch.OutOfMemoryError):
            measured = measure(config, device, batch, steps)
        if measured is None:
            batch //= 2
            continue
        return {
            "microbatch": batch,
            **measured,
            "predicted_gib": expected.peak_bytes(batch) / 2**30,
            "tflop_per_image": flops / 1e12,
        }
    return None


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["nano"], help="presets to train (nano)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed (10)")
    parser.add_argument("--most", type=int, default=32, help="most pictures of a microbatch (32)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("settings", nargs="*", help="section.name=value")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_float32_matmul_precision("high")
    rows = []
    for preset in arguments.presets:
        for policy in ("all", *reversed(KEPT)):
            if "model.posttrain_sample=true" in arguments.settings and policy not in ("all", "inputs"):
                continue  # refused, since the chain's steps are computed again as it is
            checkpointing = ("true", policy) if policy != "all" else ("false", "inputs")
            config = flowmo.preset(preset).override(
                f"trainer.compile={str(arguments.compile).lower()}",
                f"trainer.activation_checkpointing={checkpointing[0]}",
                f"trainer.checkpoint_keeps={checkpointing[1]}",
                *arguments.settings,
            )
            found = measure_largest(config, device, arguments.most, arguments.steps)
            if found is None:
                continue
            without = measure_largest(
                config.override("opt.lpips_weight=0"), device, int(found["microbatch"]), arguments.steps
            )
            assert without is not None  # it needs less memory
            peak, source = peak_flops(device, in_bfloat16(config, device))
            rows.append(
                {
                    "preset": preset,
                    "kept": policy,
                    **found,
                    "perceptual_share": 1 - found["images_per_second"] / without["images_per_second"],
                    "flop_utilisation": 1e12 * found["tflop_per_image"] * found["images_per_second"] / peak,
                    "peak_tflops": peak / 1e12,
                    "peak_is": source,
                }
            )
            if not arguments.json:
                row = rows[-1]
                print(
                    f"{preset:6} kept={policy:9} batch {row['microbatch']:3}  "
                    f"{row['images_per_second']:8.1f} images/s  "
                    f"MFU {row['flop_utilisation']:.1%} of {row['peak_tflops']:.1f} TFLOP/s ({source})  "
                    f"{row['memory_gib']:.1f} GiB, predicted {row['predicted_gib']:.1f}  "
                    f"perceptual network {row['perceptual_share']:.0%} of the step",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
