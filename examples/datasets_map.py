"""Tokenize a Hugging Face dataset with ``datasets.map``, on one machine or many.

    python examples/datasets_map.py OWNER/NAME OUT --parts 16              all parts, one after another
    python examples/datasets_map.py OWNER/NAME OUT --parts 16 --part 3     the third alone, for instance as a SLURM job

Each part becomes one Parquet file with all columns of the dataset, but ids in the place of the image. The file appears
whole or not at all: the same command skips parts that are done and begins an unfinished one anew. The ids are those of
``flowmo tokenize``. An unreadable image ends its part. Read the result with ``datasets.load_dataset("OUT")``.
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import datasets
import pyarrow.parquet
import torch

import flowmo
from flowmo.checkpoint.files import write_content
from flowmo.errors import one_line
from flowmo.images import resize_and_crop, to_tensor


def load(name: str, split: str) -> datasets.Dataset:
    """Load a dataset of the Hub, or a folder with one folder of images per class."""
    if Path(name).is_dir():
        files = {split: "**"}  # otherwise "val" in a file's name makes it another split
        return datasets.load_dataset("imagefolder", data_dir=name, data_files=files, split=split)
    return datasets.load_dataset(name, split=split)


def tokenize_part(tokenizer: flowmo.FlowMo, table: datasets.Dataset, column: str, batch_size: int) -> datasets.Dataset:
    """Replace the column of images by ids, tokens × sub-tokens."""
    side = tokenizer.config.data.image_size

    def encode(batch: dict) -> dict:
        files = [io.BytesIO(image["bytes"]) if image["bytes"] else image["path"] for image in batch[column]]
        images = [to_tensor(resize_and_crop(flowmo.read_image(file), side)) for file in files]
        return {"ids": tokenizer.encode(torch.stack(images)).ids.cpu().numpy()}

    row = datasets.Sequence(datasets.Value("int32"), tokenizer.quantizer.sub_tokens)
    features = table.features.copy()
    del features[column]
    features["ids"] = datasets.Sequence(row, tokenizer.code_length)
    raw = table.cast_column(column, datasets.Image(decode=False))  # flowmo.read_image decodes
    return raw.map(
        encode,
        batched=True,
        batch_size=batch_size,
        remove_columns=column,
        features=features,
        load_from_cache_file=False,
        new_fingerprint=f"{raw._fingerprint}-{tokenizer.identity()}",  # otherwise datasets hashes the weights
    )


def check_folder(out: Path, about: str) -> None:
    """Make the folder, or refuse one with other ids: of another dataset, tokenizer, precision or number of parts."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    note, content = out / "tokenizer.txt", f"{about}\n"
    if not note.exists():
        write_content(note, content)  # whole or not at all: other jobs may read it
    if note.read_text() != content:
        raise SystemExit(f"{out} holds ids of {note.read_text().strip()}, not {content.strip()}. Name another folder.")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="name on the Hub, or a folder of images")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--part", type=int, help="number of the only part to write, from 1")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(words)
    numbers = range(1, arguments.parts + 1) if arguments.part is None else [arguments.part]
    if arguments.parts < 1:
        parser.error("--parts is a number from 1")
    if numbers[0] not in range(1, arguments.parts + 1):
        parser.error(f"--part is a number from 1 to {arguments.parts}")
    try:
        table = load(arguments.dataset, arguments.split)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.dataset}: {one_line(error)}") from None
    column = next(name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    tokenizer = flowmo.load(arguments.model, device=arguments.device).set_precision("auto")
    if arguments.parts > len(table):
        raise SystemExit(f"{arguments.dataset} has {len(table)} images, fewer than --parts {arguments.parts}.")
    name = Path(arguments.dataset).resolve().name if Path(arguments.dataset).is_dir() else arguments.dataset
    about = [tokenizer.identity(), f"{arguments.parts} parts", f"{name}, {arguments.split}, {len(table)} images"]
    check_folder(arguments.out, ", ".join([*about, tokenizer.precision]))
    for number in numbers:
        name = f"{arguments.split}-{number - 1:05d}-of-{arguments.parts:05d}.parquet"
        path, unfinished = arguments.out / "data" / name, arguments.out / f".{name}"
        if path.is_file():
            print(f"{path}: is there already")
            continue
        part = table.shard(num_shards=arguments.parts, index=number - 1, contiguous=True)
        tokens = tokenize_part(tokenizer, part, column, arguments.batch_size)
        pyarrow.parquet.write_table(tokens.data.table, unfinished)
        os.replace(unfinished, path)
        print(f"{path}: {len(tokens)} images")


if __name__ == "__main__":
    main()
