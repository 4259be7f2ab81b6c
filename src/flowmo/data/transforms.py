"""A source's pictures as the networks see them: cropped to the training size, in [−1, 1]."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowmo.data.sources.base import DataError, Source
from flowmo.images import ImageError, resize_and_crop, to_tensor
from flowmo.streams import Stream, stream, stream_seed

ATTEMPTS = 8


@contextmanager
def time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise ``ImageError`` within the context when it takes longer, in a main thread of a system with timers."""
    if not seconds or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def give_up(number: int, frame: object) -> None:
        raise ImageError(f"{name}: still being read after {seconds:g} s (data.read_timeout)")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class ImageDataset(Dataset):
    """Pictures of a source as float32 3 × side × side in [−1, 1].

    An item is asked for as (index, seed); the seed alone decides the crop and the flip, so that what a run sees does
    not depend on its workers.

    Args:
        random_crop: crop at a random place along the longer side; otherwise at the centre.
        random_flip: mirror half of the pictures.
        draft: decode much larger JPEGs at a reduced size, see ``read_image``.
        timeout: seconds after which a picture that is still being read counts as unreadable; 0 waits for ever.
    """

    def __init__(
        self,
        source: Source,
        side: int,
        random_crop: bool = False,
        random_flip: bool = False,
        draft: bool = False,
        timeout: float = 0,
    ):
        self.source = source
        self.side = side
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.draft = draft
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        index, seed = item
        picture = self.source.read(index, self.side if self.draft else None)
        place, flip = torch.rand(2, generator=stream(seed, Stream.CROP)).tolist()
        if self.random_crop and picture.width != picture.height:
            short = min(picture.size)
            left, top = (int(place * (length - short + 1)) for length in picture.size)
            picture = picture.crop((left, top, left + short, top + short))
        image = to_tensor(resize_and_crop(picture, self.side))
        return image.flip(-1) if self.random_flip and flip < 0.5 else image

    def name(self, index: int) -> str:
        return self.source.name(index)

    def readable(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Item (index, seed), or where that picture cannot be read, one that the seed alone chooses in its place.

        Returns:
            The image, and the error message of each picture that could not be read, by its name.

        Raises:
            DataError: nor could ``ATTEMPTS`` others.
        """
        bad: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            try:
                with time_limit(self.timeout, self.source.name(index)):
                    return self[index, seed], bad
            except ImageError as error:
                bad[self.source.name(index)] = str(error)
                index = stream_seed(seed, Stream.SUBSTITUTE, attempt) % len(self)
        raise DataError(f"{ATTEMPTS} pictures in a row cannot be read, the first: {next(iter(bad.values()))}")
