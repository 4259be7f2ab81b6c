"""The web page of ``flowmo demo``: gradio around what ``demo.Page`` does.

It binds to this machine alone unless told otherwise, fetches nothing from a network, works on one request at a time,
and bounds the bytes of an upload and the requests that wait.
"""

from __future__ import annotations

import html
import os
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any

from PIL import Image

from flowmo.errors import FlowMoError
from flowmo.generate.classes import class_titles
from flowmo.web.demo import (
    FLIPPED,
    MOST_DRAWN,
    MOST_SAMPLES,
    MOST_STEPS,
    RANDOM,
    TYPED,
    DemoError,
    Page,
    Peer,
    Result,
    shown_ids,
)

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

MOST_BYTES = "20mb"
MOST_WAITING, MOST_SESSIONS = 256, 64
SECONDS_KEPT = 3600

STYLE = """
.gradio-container { max-width: 1120px !important; width: 100% !important; margin: auto !important }
footer { display: none !important }
.html-container { padding: 0 !important }
.grid-wrap { max-height: none !important; overflow: visible !important }
#facts, #peers { font-variant-numeric: tabular-nums }
.facts { display: flex; flex-wrap: wrap; gap: 10px }
.facts div { flex: 1 1 auto; padding: 8px 14px; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); background: var(--block-background-fill) }
.facts span { display: block; font-size: 12px; color: var(--body-text-color-subdued) }
.facts b { font-size: 15px }
.ends { display: flex; justify-content: space-between; margin-bottom: -10px; font-size: 13px;
  color: var(--body-text-color-subdued) }
.peers { width: 100%; border-collapse: collapse; border: 0 !important }
.peers th, .peers td { text-align: right; padding: 6px 12px !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important }
.peers th:first-child, .peers td:first-child { text-align: left }
.peers tr.own { font-weight: 600 }
"""


def facts_table(facts: dict[str, str]) -> str:
    """Names and values as HTML."""
    cells = (f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>" for name, value in facts.items())
    return f'<div class="facts">{"".join(cells)}</div>'


def peers_table(own: str, facts: dict[str, str], peers: list[Peer]) -> str:
    """The sizes of one picture as HTML, ours first."""
    rows = [("own", f"FlowMo {own}", facts["file"], facts.get("PSNR", ""))]
    for peer in peers:
        size = f"{peer.size:,} bytes" + ("" if peer.fits else ", its least")
        rows.append(("", peer.name, size, f"{peer.psnr:.2f} dB"))
    lines = (
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, *cells in rows
    )
    return f'<table class="peers"><tr><th>codec</th><th>file</th><th>PSNR</th></tr>{"".join(lines)}</table>'


def ends(left: str, right: str) -> str:
    """What is on either side of a slider."""
    return f'<div class="ends"><span>◀ {left}</span><span>{right} ▶</span></div>'


def build(page: Page) -> Any:
    """The page as a ``gradio.Blocks``.

    Raises:
        DemoError: gradio is not installed.
    """
    gr = library()
    sampling = page.tokenizer.config.eval.sampling
    folded = page.tokenizer.decoder.shape.mean_velocity
    last_token = page.tokenizer.code_length - 1
    pictures = {"format": "png", "object_fit": "contain", "show_label": False, "height": "auto"}
    slider = {"format": "png", "interactive": False, "show_label": False, "buttons": ["fullscreen"]}

    def shown(function: Callable) -> Callable:
        """Errors as messages on the page, which otherwise stays as it is."""

        @wraps(function)
        def run(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (FlowMoError, OSError, ValueError) as error:
                gr.Warning(html.escape(" ".join(str(error).split()), quote=False), title="That cannot be done")
                return gr.skip()

        return run

    def on(event: Callable, function: Callable, inputs: list, outputs: list) -> Any:
        # One at a time: a request takes all cores.
        return event(
            shown(function), inputs, outputs, concurrency_limit=1, concurrency_id="model", api_visibility="private"
        )

    def reconstruct(*arguments: Any) -> tuple:
        result = page.reconstruct(*arguments)
        pair = (result.original or result.decoded, result.decoded)
        return pair, facts_table(result.facts), result.file, shown_ids(result.codes), result

    def at_equal_bytes(file: str | None, fit: str, result: Result | None) -> tuple[str, list]:
        if result is None:
            raise DemoError("encode a picture first")
        peers = page.at_equal_bytes(file, fit, result.codes)
        seen = [(result.original, "original"), (result.decoded, f"FlowMo {page.name}")]
        return peers_table(page.name, result.facts, peers), seen + [(peer.picture, peer.name) for peer in peers]

    def samples(result: Result | None, *arguments: Any) -> tuple[list, Image.Image]:
        return page.samples(result and result.codes, *arguments)

    def edit(result: Result | None, *arguments: Any) -> tuple:
        return page.edit(result and result.codes, *arguments)

    def range_ids(result: Result | None, *places: int) -> str:
        return shown_ids(result and result.codes, *places)

    with gr.Blocks(title="FlowMo", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as blocks:
        gr.Markdown(f"# FlowMo\nA picture in a short string of token ids, and back. {page.about()}")
        result = gr.State(None, time_to_live=SECONDS_KEPT)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(
                    label="Picture, or .flowmo file",
                    file_types=["image", ".flowmo"],
                    type="filepath",
                    height=150,
                    elem_id="upload",
                )
                fit = gr.Radio(
                    [("whole picture, in tiles", "tile"), ("central square", "crop")], value="tile", label="Encode"
                )
                steps = gr.Slider(1, MOST_STEPS, sampling.sample_steps, step=1, label="Steps")
                guidance = gr.Slider(
                    1, 4, 1 if folded else sampling.guidance, step=0.1, label="Guidance", interactive=not folded
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
                run = gr.Button("Encode and decode", variant="primary", elem_id="run")
            with gr.Column(scale=2, min_width=400):
                gr.HTML(ends("original", "reconstruction"), padding=False)
                pair = gr.ImageSlider(height=400, elem_id="pair", **slider)
                facts = gr.HTML(elem_id="facts", padding=False)
                download = gr.DownloadButton("Download .flowmo", elem_id="download")
                with gr.Accordion("Ids of the first tile, a token a line", open=False):
                    ids = gr.Textbox(lines=6, max_lines=12, show_label=False, buttons=["copy"], elem_id="ids")
        request = [file, fit, steps, seed, guidance]
        everything = [pair, facts, download, ids, result]

        with gr.Tab("At equal bytes"):
            compare = gr.Button("Compare with other codecs", elem_id="compare")
            others = gr.Gallery(columns=3, elem_id="others", **pictures)
            peers = gr.HTML(elem_id="peers", padding=False)
            on(compare.click, at_equal_bytes, [file, fit, result], [peers, others])
        with gr.Tab("Several samples"):
            with gr.Row(equal_height=True):
                count = gr.Slider(2, MOST_SAMPLES, 6, step=1, label="Samples of the same code", scale=3)
                again = gr.Button("Draw", elem_id="draw", scale=1)
            with gr.Row():
                with gr.Column(scale=2, min_width=400):
                    drawn = gr.Gallery(columns=3, elem_id="samples", **pictures)
                with gr.Column(scale=1, min_width=300):
                    heat = gr.Image(format="png", interactive=False, show_label=False, elem_id="heat", buttons=[])
                    gr.Markdown("Where they differ: the deviation of a pixel over the samples, bright where great.")
            on(again.click, samples, [result, count, steps, seed, guidance], [drawn, heat])
        with gr.Tab("Edit the code"):
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    first = gr.Slider(0, last_token, 0, step=1, label="First token")
                    last = gr.Slider(0, last_token, last_token // 4, step=1, label="Last token")
                    how = gr.Radio([RANDOM, FLIPPED, TYPED], value=RANDOM, label="In every tile they become")
                    typed = gr.Textbox(lines=4, max_lines=8, label="Ids, a token a line", elem_id="typed")
                    change = gr.Button("Change them", elem_id="change")
                with gr.Column(scale=2, min_width=400):
                    gr.HTML(ends("before", "after"), padding=False)
                    edited = gr.ImageSlider(height=400, elem_id="edited", **slider)
            gr.on([first.release, last.release, result.change], range_ids, [result, first, last], [typed], queue=False)
            on(change.click, edit, [result, first, last, how, typed, steps, seed, guidance], [edited])
        if page.generator is not None:
            with gr.Tab("Generate"):
                classes = [(title, i) for i, title in enumerate(class_titles(page.generator.vocabulary.classes))]
                with gr.Row():
                    name = gr.Dropdown(classes, value=0 if classes else None, label="Class", elem_id="class")
                    wanted = gr.Slider(1, MOST_DRAWN, 8, step=1, label="Pictures")
                    own = gr.Slider(1, 10, page.generator.config.generator.guidance, step=0.1, label="Guidance")
                make = gr.Button("Generate", elem_id="generate")
                made = gr.Gallery(columns=4, elem_id="generated", **pictures)
                on(make.click, page.generate, [name, wanted, seed, own], [made])

        on(run.click, reconstruct, request, everything)
        # What was shown is of the file before; a new one is worked on at once.
        emptied = gr.on(
            [file.change, fit.change],
            lambda: (None, "", None, "", None, None, "", None, None, None),
            None,
            [*everything, others, peers, drawn, heat, edited],
            queue=False,
        )
        on(emptied.then, lambda *a: reconstruct(*a) if a[0] else (None, "", None, "", None), request, everything)
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


def check_free(host: str, port: int) -> None:
    """See that a port can be listened at, which gradio tells in its own words and many lines.

    Raises:
        DemoError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise DemoError(f"cannot serve on {host}:{port}: {(error.strerror or str(error)).lower()}") from None


def serve(page: Page, host: str = "127.0.0.1", port: int = 7860) -> Any:
    """Start to serve the page; what is returned says where (``local_url``) and can wait for its end
    (``block_thread``).

    Raises:
        DemoError: gradio is not installed, or the port is taken.
    """
    gr = library()
    check_free(host, port)
    blocks = build(page).queue(max_size=MOST_WAITING, api_open=False)
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # the machine's own: none are fetched
    colours = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
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
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"], **colours),
            css=STYLE,
        )
    except OSError as error:
        raise DemoError(f"cannot serve on {host}:{port}: {' '.join(str(error).split())}") from None
    return blocks
