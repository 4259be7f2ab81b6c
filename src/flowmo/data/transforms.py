"""Images of a source as the networks see them: cropped to the training size, in [−1, 1]."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowmo.data.sources.base import DataError, Source
from flowmo.images import ImageError, crop, resize_and_crop, size_of, to_tensor
from flowmo.images.pixels import PixelFormat
from flowmo.streams import Stream, stream, stream_seed

ATTEMPTS = 8


@contextmanager
def time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise ``ImageError`` if the block takes longer. 0 disables.

    Only the main thread on POSIX is limited. Elsewhere there is no limit.
    """
    if not seconds or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def on_alarm(number: int, frame: object) -> None:
        raise ImageError(f"{name}: not read within {seconds:g} s (data.read_timeout).")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # again, because a library may swallow the first one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(eq=False)
class ImageDataset(Dataset):
    """Images of a source as float32 c × side × side in [−1, 1]; a ``flowmo.data.loader.IndexedDataset``.

    An item is requested as (index, seed). The seed alone decides its crop and flip, so workers do not change a run.

    Attributes:
        random_crop: crop at a random position along the longer side, instead of the centre.
        random_flip: mirror half of the images.
        draft: decode much larger JPEGs at a reduced size, see ``read_image``.
        timeout: seconds before an image counts as unreadable; 0 disables.
        pixels: channels and values of the images.
    """

    source: Source
    side: int
    random_crop: bool = False
    random_flip: bool = False
    draft: bool = False
    timeout: float = 0
    pixels: PixelFormat = PixelFormat()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        index, seed = item
        image = self.source.read(index, self.side if self.draft else None, self.pixels)
        size = size_of(image)
        offset, flip = torch.rand(2, generator=stream(seed, Stream.CROP)).tolist()
        if self.random_crop and size[0] != size[1]:
            short = min(size)
            left, top = (int(offset * (length - short + 1)) for length in size)
            image = crop(image, left, top, short, short)
        tensor = to_tensor(resize_and_crop(image, self.side, self.source.name(index)))
        return tensor.flip(-1) if self.random_flip and flip < 0.5 else tensor

    def load(self, index: int, seed: int) -> tuple[Tensor, dict[str, str]]:
        """Load item (index, seed). If its image cannot be read, load one that the seed alone chooses.

        Returns:
            The image, and a dict of {name: error} for every image that failed.

        Raises:
            DataError: ``ATTEMPTS`` images in a row failed.
        """
        unreadable: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            try:
                with time_limit(self.timeout, self.source.name(index)):
                    return self[index, seed], unreadable
            except ImageError as error:
                unreadable[self.source.name(index)] = str(error)
                index = stream_seed(seed, Stream.SUBSTITUTE, attempt) % len(self)
        first = next(iter(unreadable.values()))
        raise DataError(f"{ATTEMPTS} images in a row cannot be read. The first: {first}")
