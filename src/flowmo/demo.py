"""The web page of ``flowmo demo``: a picture in, its code, its size and what it decodes to out.

Everything that the page can be asked for is bounded: the bytes and pixels of an upload, the steps, the samples, and the
requests that wait. It binds to this machine alone unless told otherwise, and needs no network.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flowmo.codec import Codec, CodecError
from flowmo.errors import FlowMoError
from flowmo.evaluate.codecs import FORMATS, CodecMissingError, CodecReconstructor
from flowmo.evaluate.figures import heat_map, psnr
from flowmo.generate.generator import Generator
from flowmo.generate.produce import Drawing, check_pair, draw
from flowmo.pictures import check_size, read_picture, resize_and_crop, to_picture, to_tensor
from flowmo.tokenizer import Codes, FlowMo

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

MOST_BYTES = "20mb"
MOST_PIXELS = 4_000_000
MOST_PIXELS_FOR_CODECS = 600_000
"""Beyond these the search for a codec's quality takes longer than anyone waits."""
MOST_STEPS, MOST_SAMPLES, MOST_DRAWN = 50, 16, 32
MOST_WAITING, MOST_SESSIONS, MOST_FILES = 256, 64, 256
SECONDS_KEPT = 3600

STYLE = """
.gradio-container { max-width: 1100px !important; margin: auto }
#facts { font-variant-numeric: tabular-nums }
"""


class DemoError(FlowMoError):
    """What the page cannot do; the message is shown on it."""


class Page:
    """What the page does, without the page.

    Args:
        codec: writes its files; the tokenizer is the one it was made for.
        folder: for the newest of these files.
    """

    def __init__(self, tokenizer: FlowMo, codec: Codec, folder: Path, generator: Generator | None = None):
        self.tokenizer, self.codec, self.folder, self.generator = tokenizer, codec, folder, generator
        if generator is not None:
            check_pair(generator, tokenizer)

    def open(self, file: str | None, fit: str) -> tuple[Image.Image | None, Codes]:
        """An upload as a picture and its codes; a ``.flowmo`` file has no picture."""
        if not file:
            raise DemoError("choose a picture first")
        path = Path(file)
        if path.suffix == ".flowmo":
            try:
                codes = self.codec.unpack(path.read_bytes())
            except CodecError as error:
                raise DemoError(f"{path.name}: {error}") from None
            if codes.tiling.height * codes.tiling.width > MOST_PIXELS:
                raise DemoError(f"{path.name}: more than {MOST_PIXELS:,} pixels, the most that this page takes")
            return None, codes
        with path.open("rb") as content:
            picture = self._bounded(content, path.name)
        if fit == "crop":
            picture = resize_and_crop(picture, self.tokenizer.config.data.image_size)
        return picture, self.tokenizer.encode_image(picture)

    def _bounded(self, content: Any, name: str) -> Image.Image:
        """A picture of no more than ``MOST_PIXELS``, which are counted before they are decoded."""
        try:
            with Image.open(content) as picture:
                check_size(picture, name)
                width, height = picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            raise DemoError(f"{name}: not a picture that can be read") from None
        if width * height > MOST_PIXELS:
            raise DemoError(
                f"{name}: {width} × {height} are more than {MOST_PIXELS:,} pixels, the most this page takes"
            )
        content.seek(0)
        return read_picture(content, name)

    def decode(self, codes: Codes, steps: int, seed: int, guidance: float) -> Image.Image:
        return self.tokenizer.decode_image(codes, int(steps), int(seed), guidance=float(guidance))

    def reconstruct(
        self, file: str | None, fit: str, steps: int, seed: int, guidance: float
    ) -> tuple[tuple[Image.Image, Image.Image], str, str, Codes]:
        """Original and reconstruction, what it took, the path of its ``.flowmo`` file, and its codes."""
        picture, codes = self.open(file, fit)
        decoded = self.decode(codes, steps, seed, guidance)
        content = self.codec.pack(codes)
        height, width = codes.tiling.height, codes.tiling.width
        lines = [
            f"**{len(content)} bytes** as a file, {8 * len(content) / (height * width):.4f} bits per pixel; "
            f"{codes.nbytes} bytes of ids packed, {codes.ids.numel()} ids in {codes.tiling.count} tile(s), "
            f"{width} × {height} pixels"
        ]
        if picture is not None:
            quality = float(psnr(to_tensor(picture)[None], to_tensor(decoded)[None]))
            lines.append(f"PSNR {quality:.2f} dB")
        path = self._keep(content, f"{Path(file).stem[:60]}.flowmo")
        return (picture or decoded, decoded), "\n\n".join(lines), str(path), codes

    def _keep(self, content: bytes, name: str) -> Path:
        """A file to download, in a folder of its own; the oldest of too many go."""
        folder = self.folder / hashlib.blake2b(content, digest_size=8).hexdigest()
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        kept = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in kept[:-MOST_FILES]:
            shutil.rmtree(old, ignore_errors=True)
        return folder / name

    def at_equal_bytes(self, file: str | None, fit: str, codes: Codes | None) -> list[tuple[Image.Image, str]]:
        """The same picture by the usual codecs in as many bytes, or in as few as they can."""
        picture, codes = self.open(file, fit) if codes is None else (self.open(file, fit)[0], codes)
        if picture is None:
            raise DemoError("a .flowmo file has no original to compress")
        if picture.width * picture.height > MOST_PIXELS_FOR_CODECS:
            raise DemoError(f"codecs are compared up to {MOST_PIXELS_FOR_CODECS:,} pixels; choose the central square")
        budget, shown = len(self.codec.pack(codes)), []
        for name in FORMATS:
            try:
                peer = CodecReconstructor(name, budget)
            except CodecMissingError:
                continue
            data = peer.encode(picture)
            decoded = Image.open(io.BytesIO(data)).convert("RGB")
            quality = float(psnr(to_tensor(picture)[None], to_tensor(decoded)[None]))
            least = "" if len(data) <= budget else ", its least"
            shown.append((decoded, f"{peer.name}: {len(data)} bytes{least}, {quality:.2f} dB"))
        return shown

    def samples(
        self, codes: Codes | None, count: int, steps: int, seed: int, guidance: float
    ) -> tuple[list[tuple[Image.Image, str]], Image.Image]:
        """Pictures of one code from several seeds, and where they differ: the deviation of a pixel over them."""
        if codes is None:
            raise DemoError("encode a picture first")
        count = min(int(count), MOST_SAMPLES)
        drawn = [self.decode(codes, steps, int(seed) + i, guidance) for i in range(count)]
        deviation = torch.stack([to_tensor(picture) for picture in drawn]).std(dim=0).mean(dim=0)
        return [(p, f"seed {int(seed) + i}") for i, p in enumerate(drawn)], to_picture(heat_map(deviation))

    def edit(
        self, codes: Codes | None, first: int, last: int, how: str, steps: int, seed: int, guidance: float
    ) -> tuple[Image.Image, Image.Image]:
        """The picture before and after some tokens of every tile are replaced."""
        if codes is None:
            raise DemoError("encode a picture first")
        first, last = sorted((int(first), int(last)))
        changed = codes.ids.clone()
        part = changed[:, first : last + 1]
        if how == "all bits flipped":
            part.copy_(codes.id_count - 1 - part)
        else:
            generator = torch.Generator().manual_seed(int(seed))
            part.copy_(torch.randint(codes.id_count, part.shape, generator=generator))
        edited = Codes(changed, codes.size, codes.id_count, codes.tiling)
        return self.decode(codes, steps, seed, guidance), self.decode(edited, steps, seed, guidance)

    def generate(self, name: str, count: int, seed: int, guidance: float) -> list[Image.Image]:
        """Pictures of a class."""
        count = min(int(count), MOST_DRAWN)
        drawing = Drawing(seed=int(seed), guidance=float(guidance))
        labels = [self.generator.label(name)] * count
        return [to_picture(x) for x in draw(self.generator, self.tokenizer, labels, range(count), drawing)]


def build(page: Page) -> Any:
    """The page as a ``gradio.Blocks``.

    Raises:
        DemoError: gradio is not installed.
    """
    gr = library()
    sampling = page.tokenizer.config.eval.sampling
    folded = page.tokenizer.decoder.shape.mean_velocity
    last_token = page.tokenizer.code_length - 1

    def shown(function: Callable) -> Callable:
        """Errors as messages on the page."""

        @wraps(function)
        def run(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (FlowMoError, OSError, ValueError) as error:
                raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

        return run

    with gr.Blocks(title="FlowMo", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as blocks:
        gr.Markdown("# FlowMo\nA picture in a short string of token ids, and back.")
        codes = gr.State(None, time_to_live=SECONDS_KEPT)

        def on(button: Any, function: Callable, inputs: list, outputs: list) -> Any:
            # One at a time: a request takes all cores.
            return button.click(
                shown(function), inputs, outputs, concurrency_limit=1, concurrency_id="model", api_visibility="private"
            )

        with gr.Row():
            with gr.Column(scale=1):
                file = gr.File(
                    label="Picture, or .flowmo file", file_types=["image", ".flowmo"], type="filepath", elem_id="upload"
                )
                fit = gr.Radio(
                    [("whole picture, in tiles", "tile"), ("central square", "crop")], value="tile", label="Fit"
                )
                steps = gr.Slider(1, MOST_STEPS, sampling.sample_steps, step=1, label="Steps")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
                guidance = gr.Slider(
                    1, 4, 1 if folded else sampling.guidance, step=0.1, label="Guidance", interactive=not folded
                )
                run = gr.Button("Encode and decode", variant="primary", elem_id="run")
            with gr.Column(scale=2):
                pair = gr.ImageSlider(
                    label="Original | reconstruction", format="png", interactive=False, elem_id="pair"
                )
                facts = gr.Markdown(elem_id="facts")
                download = gr.DownloadButton("Download .flowmo", elem_id="download")
        on(run, page.reconstruct, [file, fit, steps, seed, guidance], [pair, facts, download, codes])

        with gr.Tab("At equal bytes"):
            compare = gr.Button("Compare with other codecs", elem_id="compare")
            others = gr.Gallery(label="The same picture in as many bytes", columns=4, format="png", elem_id="others")
            on(compare, page.at_equal_bytes, [file, fit, codes], [others])
        with gr.Tab("Several samples"):
            count = gr.Slider(2, MOST_SAMPLES, 6, step=1, label="Samples")
            again = gr.Button("Draw", elem_id="draw")
            with gr.Row():
                drawn = gr.Gallery(label="One code, several seeds", columns=4, format="png", elem_id="samples")
                heat = gr.Image(label="Where they differ", format="png", interactive=False, elem_id="heat")
            on(again, page.samples, [codes, count, steps, seed, guidance], [drawn, heat])
        with gr.Tab("Edit the code"):
            first = gr.Slider(0, last_token, 0, step=1, label="First token")
            last = gr.Slider(0, last_token, last_token // 4, step=1, label="Last token")
            how = gr.Radio(["drawn at random", "all bits flipped"], value="drawn at random", label="These tokens")
            change = gr.Button("Change them", elem_id="change")
            edited = gr.ImageSlider(label="Before | after", format="png", interactive=False, elem_id="edited")
            on(change, page.edit, [codes, first, last, how, steps, seed, guidance], [edited])
        if page.generator is not None:
            with gr.Tab("Generate"):
                classes = list(page.generator.vocabulary.classes)
                name = gr.Dropdown(classes, value=classes[0] if classes else None, label="Class")
                wanted = gr.Slider(1, MOST_DRAWN, 8, step=1, label="Pictures")
                own = gr.Slider(1, 10, page.generator.config.generator.guidance, step=0.1, label="Guidance")
                make = gr.Button("Generate", elem_id="generate")
                made = gr.Gallery(label="Generated", columns=8, format="png", elem_id="generated")
                on(make, page.generate, [name, wanted, seed, own], [made])
    return blocks


def library() -> Any:
    """gradio.

    Raises:
        DemoError: it is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise DemoError("the web page needs gradio: pip install 'flowmo[demo]'") from None
    return gradio


def serve(page: Page, host: str = "127.0.0.1", port: int = 7860) -> Any:
    """Start to serve the page; what is returned says where (``local_url``) and can wait for its end
    (``block_thread``).

    Raises:
        DemoError: gradio is not installed, or the port is taken.
    """
    gr = library()
    blocks = build(page).queue(max_size=MOST_WAITING, api_open=False)
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # the machine's own: none are fetched
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            max_file_size=MOST_BYTES,
            state_session_capacity=MOST_SESSIONS,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
        )
    except OSError as error:
        raise DemoError(f"cannot serve on {host}:{port}: {' '.join(str(error).split())}") from None
    return blocks
