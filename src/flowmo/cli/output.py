"""What commands write: results, errors, progress, files."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowmo.checkpoint.files import write_content
from flowmo.errors import FlowMoError

PIPE = Path("-")
"""Names standard input or output."""
IMAGE_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
    ".ppm": {"format": "PPM"},
}
"""How Pillow writes an image, by the suffix of its file."""


class UsageError(FlowMoError):
    """Arguments that contradict each other."""


def status_of(program: str, run: Callable[[], object]) -> int:
    """Run a program and return its exit status. Errors that a user can fix are one line on standard error."""
    try:
        run()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FlowMoError, OSError) as error:
        print(f"{program}: {message_of(error)}", file=sys.stderr)
        return 2
    return 0


def message_of(error: Exception) -> str:
    """Write an error as one line, without the number that Python puts before an operating system's error."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split())


def progress_bar(name: str) -> Callable[[int, int], None] | None:
    """Make a counter on standard error, if that is a terminal that can rewrite a line."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{name[:40]} {done}/{total}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()

    return show


def check_outputs(outputs: Sequence[Path], suffixes: Sequence[str] = ()) -> None:
    """Refuse outputs that would overwrite each other or whose suffix is not among ``suffixes``.

    Raises:
        UsageError: with a message that names the file.
    """
    for path, count in Counter(outputs).items():
        if count > 1:
            raise UsageError(f"Two results would both be written to {path}. Give them other names.")
        if suffixes and path.suffix.lower() not in suffixes:
            raise UsageError(
                f"Cannot write {path}: its format is unknown. Use a name that ends in {', '.join(suffixes)}."
            )


def write(output: Path, content: bytes | Image.Image) -> None:
    """Write a file atomically, or to standard output. An image gets the format of the suffix; PNG on standard output.

    Raises:
        UsageError: the file cannot be written, or standard output is a terminal.
    """
    if isinstance(content, Image.Image):
        stream = io.BytesIO()
        content.save(stream, **IMAGE_FORMATS[".png" if output == PIPE else output.suffix.lower()])
        content = stream.getvalue()
    if output == PIPE:
        if sys.stdout.isatty():
            raise UsageError("Standard output is a terminal. Name a file with --output, or pipe into a program.")
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        write_content(output, content)
    except OSError as error:  # names the temporary file
        raise UsageError(f"Cannot write {output}: {error.strerror}.") from None
