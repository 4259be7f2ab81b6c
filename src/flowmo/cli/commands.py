"""Every command and every option of the command line, as one table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from flowmo.cli.options import FINITE, POSITIVE, SEED, Command, Option, device, number, option
from flowmo.config import GENERATOR_PRESETS, PRESETS, UNMASKING_ORDERS

DATASET = "folder, .tar, WebDataset shards or hf:NAME:SPLIT"
JSON = option("--json", action="store_true", help="print JSON and nothing else")
EXAMPLES = option("--examples", type=Path, nargs="+", default=(), metavar="PICTURE", help="images to try on the page")
FORCE = option("--force", action="store_true", help="overwrite files that exist")
DEVICE = option("--device", type=device, help="cpu, cuda, mps … (default: a GPU if there is one)")
PRECISION = "precision of matrix products; auto is bfloat16 with TF32 on a GPU that has it, else float32"
MODEL = (
    option("--model", default="nano", help="preset, file, folder or Hub id of the tokenizer's weights"),
    DEVICE,
    option("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help=PRECISION),
    option("--compile", action="store_true", help="compile first: half a minute, then faster; needs a C++ compiler"),
)
SAMPLING = (
    option("--steps", type=POSITIVE, help="sampling steps (default: the model's own; 1 of nano, 25 of the paper's)"),
    option("--seed", type=SEED, default=0, help="seed of the noise"),
    option("--guidance", type=FINITE, help="classifier-free guidance; 1 is none (default: the model's own)"),
)
WHOLE = "whole or tile: the whole image, in blended tiles if the model has one size; crop: the central square"
RATE = "variable-rate models: the highest rate up to RATE bits per pixel (default: the full rate)"
FIT = (
    option("--fit", choices=("whole", "tile", "crop"), default="whole", help=WHOLE),
    option("--bpp", type=FINITE, metavar="RATE", help=RATE),
)
IMAGES = option("images", nargs="+", type=Path, metavar="PICTURE", help="image file, or - for standard input")
PICTURES = option("images", metavar="PICTURES", help=DATASET)
CODEC = (
    option("--context", type=Path, metavar="FILE", help="context model of the ids (default: the tokenizer's)"),
    option("--generator", type=Path, metavar="FILE", help="generator to use as the context model; slower"),
)
OUT_DIR = option("--out-dir", dest="output", type=lambda text: os.path.join(text, ""), help=argparse.SUPPRESS)
"""An earlier name of ``--output`` for a folder."""
PEERS = (
    "also measure codecs at equal bytes (jpeg webp avif jxl) and tokenizers (llamagen16=WEIGHTS, MODULE:NAME=WEIGHTS)"
)
RESUME = (
    "checkpoint to resume, or weights to fine-tune: preset, file, folder or Hub id. Without --preset and --config "
    "a run takes the model's own settings"
)
GRAPHS = {
    "onnx": "write ONNX files (the default)",
    "torch": "write torch.export files",
    "page": "a page that runs them; uses npm",
}
WRITERS = ("webdataset", "datasets")
KINDS = ("auto", "inception", "inception-legacy", "resnet", "none")
FEATURES = (
    "network of the Fréchet distance: auto is FID's Inception if its weights are found; inception-legacy sees float "
    "images, as in the release's rFID"
)
GUIDANCE = (
    "classifier-free guidance g of the ids: null + g (class - null), or with generator.guided_from=class, as in "
    "TiTok, class + g (class - null), where 1.5 is 2.5 of the first form (default: the generator's, 1.5)"
)


def output(text: str, *former: str, **settings: Any) -> Option:
    """Make the option that names what a command writes. ``former``: its earlier names, beside ``--out``."""
    settings = {"type": Path, "metavar": "PATH", "help": text} | settings
    return option("--output", "-o", former=("--out", *former), **settings)


def run_folder(name: str) -> tuple[Option, Option]:
    """Make the options that name a run's folder."""
    return (
        option("--experiment-name", default=name, help="name of the run's folder"),
        option("--results-dir", type=Path, default=Path("results"), help="folder of all runs"),
    )


COMMANDS = (
    Command(
        "images.reconstruct",
        "Write images beside their reconstructions. Print the size of each code, its bits per pixel and PSNR.",
        IMAGES,
        output("folder to write to", default=Path("reconstructions")),
        option("--grid", type=Path, metavar="FILE", help="with --fit crop: also write all of them as one image"),
        *(*MODEL, *SAMPLING, *FIT, FORCE, JSON),
    ),
    Command(
        "images.encode",
        "Write images as .flowmo files. The ids are entropy-coded if the tokenizer has a context model. A .flowmo file "
        "as input is written anew, packed, coded or at a lower rate. The output can follow a single input: encode "
        "photo.jpg photo.flowmo. - is standard input or output: encode - -.",
        IMAGES,
        output("file, or folder for several; - is standard output (default: PICTURE with .flowmo)", type=str),
        *(OUT_DIR, *CODEC),
        option("--packed", action="store_true", help="pack the ids without entropy coding"),
        *(*MODEL, *FIT, FORCE, JSON),
    ),
    Command(
        "images.decode",
        "Decode .flowmo files to images. The output can follow a single file: decode photo.flowmo photo.png. - is "
        "standard input or output, as PNG: decode - -.",
        option("files", nargs="+", type=Path, metavar="FILE", help=".flowmo file, or - for standard input"),
        output("image, or folder for several; - is standard output (default: FILE.flowmo.png)", type=str),
        *(OUT_DIR, *CODEC),
        option("--ids", action="store_true", help="print the ids as JSON and decode no image"),
        *(*MODEL, *SAMPLING, FORCE, JSON),
    ),
    Command(
        "evaluation.evaluate",
        "Measure reconstructions (PSNR, SSIM, LPIPS, rFID) or generated images (FID). With PICTURES: PSNR, SSIM, "
        "LPIPS, rFID and bits per pixel of a model, with --peers also of codecs, with --report as a page. With "
        "--reference: FID and related metrics of generated PICTURES. Without PICTURES: the newest checkpoint of a "
        "run, eval.eval_dir=results/RUN, or with eval.continuous=true every checkpoint as it appears.",
        option("images", nargs="?", metavar="PICTURES", help=DATASET),
        option("--limit", type=POSITIVE, help="use this many images, evenly spread"),
        option(
            "--fit", choices=("crop", "whole"), default="crop", help="central square, or each image at its own size"
        ),
        option("--bpp", type=FINITE, nargs="+", metavar="RATE", help=f"{RATE}; several are measured one by one"),
        option("--size", type=POSITIVE, help="side of the square crops, in tiles if need be (default: the model's)"),
        option("--peers", nargs="+", default=(), metavar="PEER", help=PEERS),
        option("--report", type=Path, help="folder for a page with tables, plots and images"),
        option("--reference", help="PICTURES are generated: compare them with this folder or ADM's .npz"),
        option("--no-lpips", action="store_true", help="leave out LPIPS, which needs trained networks"),
        option("--features", choices=KINDS, default="auto", help=FEATURES),
        option("--enlarge", action="store_true", help="enlarge images smaller than the crop instead of refusing them"),
        *(*run_folder("my_evaluation"), *MODEL, *SAMPLING, JSON),
    ),
    Command(
        "training.train",
        "Train a tokenizer or a generator. On images: stage 1A; with model.posttrain_sample=true stage 1B; with "
        "opt.teacher=MODEL stage 1C, distillation. On tokens, with a generator's preset: stage 2. The same command "
        "resumes a run.",
        option("--preset", choices=(*PRESETS, *GENERATOR_PRESETS), help="settings to start from"),
        option("--config", type=Path, help="YAML file of settings that replace the preset's, or lo's"),
        *run_folder("my_experiment"),
        option("--resume-from-ckpt", metavar="MODEL", help=RESUME),
        DEVICE,
    ),
    Command(
        "generation.tokenize",
        "Write a dataset's ids, which train a generator. They are bit-packed in shards. Under torchrun "
        "the processes share the work. Run an interrupted command again to complete it.",
        PICTURES,
        output("folder for the shards; an interrupted one is completed", required=True),
        option("--crops", type=POSITIVE, default=1, help="crops per image: 1 is the central square, more are random"),
        option("--flip", action="store_true", help="add the mirror image of each crop"),
        option("--no-labels", action="store_true", help="leave out the classes"),
        option("--seed", type=SEED, default=0, help="seed of random crops"),
        option(
            "--shard-size", type=POSITIVE, default=4096, help="samples per shard; an interruption loses one at most"
        ),
        option("--workers", type=number(int, 0), default=0, help="processes that read images"),
        option("--part", default="1/1", metavar="K/N", help="write only the K-th of N parts, as one of N jobs"),
        *(*MODEL, JSON),
    ),
    Command(
        "generation.generate",
        "Generate images of classes with a trained generator. Many images go "
        "to a folder, or to the .npz that FID reads, also under torchrun: --count 50000 --output samples.npz. With "
        "--edit, part of an image's ids is kept and the rest generated.",
        option("generator", metavar="GENERATOR", help="generator's .safetensors file or training checkpoint"),
        option("--class", dest="classes", nargs="+", metavar="CLASS", help="name, WordNet id or index (default: all)"),
        option("--per-class", type=POSITIVE, default=8, help="images per class"),
        option("--count", type=POSITIVE, help="images in total, shared evenly by the classes"),
        output("a .png, a folder or an .npz", default=Path("generated.png")),
        option("--edit", type=Path, metavar="PICTURE", help="start from the ids of this image"),
        option("--keep", default="0-0", metavar="TOKENS", help="with --edit: tokens to keep, such as 0-31,40"),
        option("--steps", type=POSITIVE, help="steps from masked ids to all ids (default: the generator's, 64)"),
        option("--guidance", type=FINITE, help=GUIDANCE),
        option("--temperature", type=FINITE, help="softmax temperature of the first step (default: 1.3)"),
        option("--last-temperature", type=FINITE, help="softmax temperature of the last step (default: 0.5)"),
        option("--choice-temperature", type=FINITE, help="noise in the choice of ids to keep (default: 4.5)"),
        option("--order", choices=UNMASKING_ORDERS, help="order in which ids are unmasked (default: confidence)"),
        option("--seed", type=SEED, default=0, help="seed of everything random"),
        option("--decode-steps", type=POSITIVE, help="sampling steps of the tokenizer (default: its own)"),
        option("--decode-guidance", type=FINITE, help="guidance of the tokenizer (default: its own)"),
        *(*MODEL, FORCE, JSON),
    ),
    Command(
        "models.info",
        "Print parameters, bits per pixel and network passes of a preset, checkpoint or settings file. No weights are "
        "allocated.",
        option("model", nargs="?", default=argparse.SUPPRESS, help="preset, settings file or weights (default: nano)"),
        option("--model", default="nano", help=argparse.SUPPRESS),
        JSON,
        option("--training", action="store_true", help="also compute the cost of training"),
        option("--settings", dest="list_settings", action="store_true", help="also list every setting"),
    ),
    Command(
        "models.bench",
        "Measure how fast a model is on this machine, beside the machine's own rate of matrix products.",
        option("--batch", type=POSITIVE, default=1, help="images per batch"),
        option("--repeats", type=POSITIVE, default=5, help="runs to take the median of"),
        *MODEL,
        JSON,
    ),
    Command(
        "models.convert",
        "Convert any checkpoint to .safetensors. The file of a tokenizer or generator has its settings inside.",
        option("source", help="authors' or training checkpoint (.pth), or any other weights"),
        option("output", type=Path, help="file to write, .safetensors"),
        option("--dtype", choices=("float32", "float16", "int8"), default="float32", help="int8: a scale per channel"),
        option("--last-weights", action="store_true", help="take the last weights, not their EMA"),
        *(FORCE, JSON),
    ),
    Command(
        "models.export",
        "Export encoder and decoder as graphs that run without this package, or as a web page that needs no server "
        "program. model.json describes them.",
        option("source", help="preset, file or folder of the weights"),
        option("output", type=Path, help="folder to write"),
        *(
            option(f"--{kind}", dest="kind", action="store_const", const=kind, default="onnx", help=text)
            for kind, text in GRAPHS.items()
        ),
        option("--dtype", choices=("float32", "float16", "int8"), help="dtype of ONNX weights (default: float16)"),
        option("--runtime", type=Path, help="with --page: unpacked npm package onnxruntime-web, instead of npm"),
        *(EXAMPLES, FORCE, JSON),
    ),
    Command(
        "models.push",
        "Upload a tokenizer to the Hugging Face Hub. Its context model and a model card go with it. With "
        "--output, only write the same files to a folder.",
        option("source", help="preset, file or folder of the weights"),
        option("name", metavar="OWNER/NAME", help="repository; created if it does not exist"),
        option("--private", action="store_true", help="create a private repository"),
        option("--evaluation", type=Path, metavar="FILE", help="output of flowmo evaluate --json, for the model card"),
        output("only write the files to this folder", "--folder"),
        *(FORCE, JSON),
    ),
    Command(
        "models.demo",
        "Serve a web page to try a model. Upload an image, see the size of its code and its reconstruction.",
        option("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in"),
        option("--port", type=number(int, 1, 65535), default=7860, help="port to listen on"),
        option("--generator", type=Path, metavar="FILE", help="generator of the tokenizer's ids, to generate images"),
        *(EXAMPLES, *MODEL),
    ),
    Command(
        "models.completion",
        "Print a script that completes commands, options and file names in a shell. It starts no Python.",
        option("shell", choices=("bash", "zsh", "tcsh"), help="shell to write the script for"),
        configurable=False,
    ),
)

DATA_COMMANDS = (
    Command(
        "training.index",
        "Index tars of images. Training then reads their images without unpacking them.",
        option("tars", nargs="+", type=Path, metavar="TAR", help="uncompressed tar of images, or of tars of images"),
        output("file to write (default: TAR with .index.json)"),
        *(FORCE, JSON),
        configurable=False,
    ),
    Command(
        "training.show",
        "Show the training data in a source. Print its images, their classes, and the files that are left out, with "
        "reasons.",
        option("source", metavar="SOURCE", help=f"{DATASET}, as data.train"),
        option("--index", type=Path, help="index of a single tar, as data.train_index (default: TAR.index.json)"),
        JSON,
        configurable=False,
    ),
    Command(
        "generation.export",
        "Convert tokens to WebDataset tars or a Hugging Face dataset. Each shard becomes a file with ids and labels.",
        option("tokens", metavar="TOKENS", help="folder written by flowmo tokenize"),
        option("output", metavar="OUT", type=Path, help="empty folder for the files"),
        option("--to", choices=WRITERS, required=True, help="webdataset: .tar files; datasets: .parquet files"),
        JSON,
        configurable=False,
    ),
)
