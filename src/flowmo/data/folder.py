"""A folder of pictures as a source: its files in a fixed order, cropped to the training size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowmo.errors import FlowMoError
from flowmo.pictures import EXTENSIONS, read_picture, resize_and_crop, to_tensor


class DataError(FlowMoError, ValueError):
    """A source of pictures that is missing or empty."""


def list_pictures(folder: str | Path) -> list[Path]:
    """Every picture file below ``folder``, sorted by its path, so that all processes see one order.

    Raises:
        DataError: no such folder, or no pictures in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder of pictures")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not files:
        raise DataError(f"{folder}: holds no pictures ({', '.join(EXTENSIONS)})")
    return files


class PictureFolder(Dataset):
    """Pictures of a folder as float32 3 × side × side in [−1, 1].

    An item is asked for as (index, seed); the seed alone decides the crop and the flip, so that what a run sees does
    not depend on its workers.

    Args:
        random_crop: crop at a random place along the longer side; otherwise at the centre.
        random_flip: mirror half of the pictures.
    """

    def __init__(self, folder: str | Path, side: int, random_crop: bool = False, random_flip: bool = False):
        self.files = list_pictures(folder)
        self.side = side
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        index, seed = item
        picture = read_picture(self.files[index])
        generator = torch.Generator().manual_seed(seed)
        place, flip = torch.rand(2, generator=generator).tolist()
        if self.random_crop and picture.width != picture.height:
            short = min(picture.size)
            left, top = (round(place * (length - short)) for length in picture.size)
            picture = picture.crop((left, top, left + short, top + short))
        image = to_tensor(resize_and_crop(picture, self.side))
        return image.flip(-1) if self.random_flip and flip < 0.5 else image
