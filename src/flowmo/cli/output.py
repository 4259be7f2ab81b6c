"""What commands write: results, errors, progress, files."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmo.errors import FlowMoError

if TYPE_CHECKING:
    from PIL import Image

PIPE = Path("-")
"""Names standard input or output."""
IMAGE_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
    ".avif": {"format": "AVIF", "quality": 90},
    ".ppm": {"format": "PPM"},
}
"""How Pillow writes an image, by the suffix of its file."""
LOG_SECONDS = 30
"""Seconds between lines of progress where standard error is no terminal."""
REDRAW_SECONDS = 0.1
ERASE = "\r\033[K"
"""Removes the line of a terminal that a ``Progress`` has drawn."""


class UsageError(FlowMoError):
    """Arguments that contradict each other."""


def status_of(program: str, run: Callable[[], object]) -> int:
    """Run a program and return its exit status. Errors that a user can fix are one line on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        try:
            run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        warn("interrupted", program)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FlowMoError, OSError) as error:
        warn(error, program)
        return 2
    return 0


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def warn(message: str | Exception, program: str = "flowmo") -> None:
    """Print one line on standard error, in place of a progress line. It leaves out the number of a system error."""
    text = str(message)
    if isinstance(message, OSError) and message.filename and message.strerror:
        text = f"{message.filename}: {message.strerror.lower()}"
    erase = ERASE if is_terminal() else ""
    print(f"{erase}{program}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def require(package: str, purpose: str, install: str) -> None:
    """Report a missing optional package before any work is done.

    Raises:
        UsageError: ``package`` is not installed.
    """
    if find_spec(package) is None:
        raise UsageError(f"{purpose} needs {package}. Install it: pip install {install}.")


class Progress:
    """A callback with (done, total) that shows the count and the time left on standard error.

    A terminal has one line, which is rewritten. A log gets a line every ``LOG_SECONDS``.
    """

    def __init__(self, name: str):
        self.name = " ".join(name.split())[:40]
        self.terminal = is_terminal()
        self.start = time.monotonic()
        self.shown = -math.inf if self.terminal else self.start

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total:
            self.clear()
        elif now - self.shown >= (REDRAW_SECONDS if self.terminal else LOG_SECONDS):
            seconds = round((now - self.start) * (total - done) / max(done, 1))
            left = f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left" if done and seconds else ""
            text = f"{self.name} {done} of {total}{left}"
            if self.terminal:
                print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            else:
                warn(text)
            self.shown = now

    def clear(self) -> None:
        """Remove the line from a terminal, so that something else can be printed."""
        if self.terminal:
            print(ERASE, end="", file=sys.stderr, flush=True)


def image_suffixes() -> list[str]:
    """Suffixes of the images that the installed Pillow writes."""
    from PIL import Image

    Image.init()
    return [suffix for suffix in IMAGE_FORMATS if suffix != ".avif" or "AVIF" in Image.SAVE]


def check_outputs(
    outputs: Sequence[Path], force: bool, suffixes: Sequence[str] = (), inputs: Sequence[Path] = ()
) -> None:
    """Refuse outputs that cannot be written or would overwrite something, before any work is done.

    Args:
        force: overwrite files that exist.
        suffixes: accepted suffixes, such as ``IMAGE_FORMATS``; all by default.
        inputs: files that are never overwritten.

    Raises:
        UsageError: with a message that names the file.
    """
    outputs, kept = [path for path in outputs if path != PIPE], {path.resolve() for path in inputs}
    for path, count in Counter(outputs).items():
        if count > 1:
            raise UsageError(f"Two results would both be written to {path}. Give them other names.")
        if suffixes and path.suffix.lower() not in suffixes:
            raise UsageError(
                f"Cannot write {path}: its format is unknown. Use a name that ends in {', '.join(suffixes)}."
            )
        if path.resolve() in kept:
            raise UsageError(f"{path} is an input. Name another output.")
        if path.is_dir():
            raise UsageError(f"Cannot write {path}: Is a directory.")
        if path.exists() and not path.is_file():  # a device or a pipe
            continue
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise UsageError(f"Cannot write {path}: {folder} is a file, not a folder.")
        if not os.access(folder, os.W_OK):
            raise UsageError(f"Cannot write {path}: You may not write to the folder {folder}.")
    existing = [path for path in outputs if path.is_file()]
    if existing and not force:
        others = f" and {len(existing) - 1} more exist" if len(existing) > 1 else " exists"
        raise UsageError(f"{existing[0]}{others} already. Add --force to overwrite, or name another output.")


def write(output: Path, content: bytes | Image.Image) -> None:
    """Write a file atomically, or to standard output. An image gets the format of the suffix; PNG on standard output.

    Raises:
        UsageError: the file cannot be written, or standard output is a terminal.
    """
    from flowmo.checkpoint.files import write_content

    if not isinstance(content, bytes):
        stream, (width, height) = io.BytesIO(), content.size
        try:
            content.save(stream, **IMAGE_FORMATS[".png" if output == PIPE else output.suffix.lower()])
        except (OSError, RuntimeError, ValueError) as error:  # WebP, AVIF and JPEG have a longest side
            raise UsageError(f"{output}: {width}×{height} pixels cannot be written ({error}). Write .png.") from None
        content = stream.getvalue()
    if output == PIPE:
        if sys.stdout.isatty():
            raise UsageError("Standard output is a terminal. Name a file with --output, or pipe into a program.")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        if output.exists() and not output.is_file():  # a device or a named pipe, which must not be replaced
            output.write_bytes(content)
        else:
            write_content(output, content)
    except OSError as error:  # names the temporary file
        raise UsageError(f"Cannot write {output}: {error.strerror}.") from None
