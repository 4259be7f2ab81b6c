"""Speed, memory and FLOP utilisation of whole training steps: loss, gradients, Adam, norm control, averaged weights.

    python benchmarks/train_step.py                                             # nano on a CPU
    python benchmarks/train_step.py --device cuda --presets small lo --compile  # on one large GPU

Pictures are noise and the perceptual network's weights are random, which changes no time. The microbatch is the
largest power of two that the memory holds by arithmetic, at most ``--most``, and is halved where that was too much.
Every row gives what ``flowmo info PRESET --training`` predicted beside what was measured, and the perceptual network's
share of a step, which is timed again without it. Stage 1B: ``model.posttrain_sample=true opt.lpips_mode=resnet``.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import flowmo
from flowmo.config import CHECKPOINTED, Config
from flowmo.distributed import World
from flowmo.perceptual import blank_distance
from flowmo.train.account import peak_flops, training_cost
from flowmo.train.distributed import prepare
from flowmo.train.loop import machine_memory, used_memory
from flowmo.train.optimizer import Average, NormControl, build_optimizer, clip_gradients
from flowmo.train.stages import Draws, Stage


def measure(config: Config, device: torch.device, batch: int, steps: int) -> dict[str, float]:
    """Images a second (median step after two that warm up) and most bytes held."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    tokenizer = flowmo.FlowMo(config).to(device)
    perceptual = blank_distance(config.opt.lpips_mode).to(device) if config.opt.lpips_weight else None
    stage = prepare(Stage(tokenizer, perceptual), World(device=device), config.trainer)
    optimizer, average = build_optimizer(tokenizer), Average(tokenizer, batch)
    norms = NormControl(tokenizer.networks)
    side = config.data.image_size
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for step in range(steps + 2):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        draws = Draws.of(config, images, range(step * batch, (step + 1) * batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.enable_bfloat16):
            loss = stage(images, draws)
        loss.total.backward()
        clip_gradients(tokenizer.parameters(), config.opt.max_grad_norm)
        optimizer.step()
        norms.apply()
        average.update(step)
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    rest = sorted(times[2:])
    return {
        "images_per_second": batch / rest[len(rest) // 2],
        "slowest_over_median": rest[-1] / rest[len(rest) // 2],
        "memory_gib": used_memory(device) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        for policy in ("all", *reversed(CHECKPOINTED)):
            checkpointing = ("true", policy) if policy != "all" else ("false", "inputs")
            config = flowmo.preset(preset).override(
                f"trainer.compile={str(arguments.compile).lower()}",
                f"trainer.activation_checkpointing={checkpointing[0]}",
                f"trainer.checkpoint_keeps={checkpointing[1]}",
                *arguments.settings,
            )
            fused = device.type == "cuda"
            cost = training_cost(config, fused=fused)
            memory = torch.cuda.get_device_properties(device).total_memory if fused else machine_memory()
            batch = 2 ** (min(cost.most_pictures(memory), arguments.most).bit_length() - 1)
            figures = None
            while figures is None:
                try:
                    figures = measure(config, device, batch, arguments.steps)
                except torch.OutOfMemoryError:
                    if batch == 1:
                        break
                    batch //= 2
                    torch.cuda.empty_cache()
            if figures is None:
                continue
            without = measure(config.override("opt.lpips_weight=0"), device, batch, arguments.steps)
            perceptual_share = 1 - figures["images_per_second"] / without["images_per_second"]
            peak, source = peak_flops(device, config.trainer.enable_bfloat16)
            rows.append(
                {
                    "preset": preset,
                    "kept": policy,
                    "microbatch": batch,
                    **figures,
                    "perceptual_share": perceptual_share,
                    "predicted_gib": (cost.state_bytes + batch * cost.activation_bytes) / 2**30,
                    "tflop_per_image": cost.flops / 1e12,
                    "flop_utilisation": cost.flops * figures["images_per_second"] / peak,
                    "peak_tflops": peak / 1e12,
                    "peak_is": source,
                }
            )
            if not arguments.json:
                row = rows[-1]
                print(
                    f"{preset:6} kept={policy:9} batch {batch:3}  {row['images_per_second']:8.1f} images/s  "
                    f"MFU {row['flop_utilisation']:.1%} of {row['peak_tflops']:.1f} TFLOP/s ({source})  "
                    f"{row['memory_gib']:.1f} GiB, predicted {row['predicted_gib']:.1f}  "
                    f"perceptual network {row['perceptual_share']:.0%} of the step",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
