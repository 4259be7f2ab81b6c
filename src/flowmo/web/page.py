"""The web page of ``flowmo demo``: a gradio interface to ``demo.Demo``.

It listens on this machine only unless told otherwise, loads nothing from a network, runs one request at a time, and
limits upload bytes and waiting requests.
"""

from __future__ import annotations

import html
import os
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any

from flowmo.errors import FlowMoError
from flowmo.generate.classes import class_titles
from flowmo.web import demo as limits
from flowmo.web.demo import FLIPPED, RANDOM, TYPED, Demo, DemoError, Peer, Result, show_ids

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

MAX_BYTES = "20mb"
MAX_WAITING, MAX_SESSIONS = 256, 64
SECONDS_KEPT = 3600
IMAGES = {"format": "png", "object_fit": "contain", "show_label": False, "height": "auto"}
PAIR = {"format": "png", "interactive": False, "show_label": False, "buttons": ["fullscreen"], "height": 400}

STYLE = """
.gradio-container { max-width: 1120px !important; width: 100% !important; margin: auto !important }
footer { display: none !important }
.html-container { padding: 0 !important }
.grid-wrap { max-height: none !important; overflow: visible !important }
#metrics, #peers { font-variant-numeric: tabular-nums }
.metrics { display: flex; flex-wrap: wrap; gap: 10px }
.metrics div { flex: 1 1 auto; padding: 8px 14px; border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); background: var(--block-background-fill) }
.metrics span { display: block; font-size: 12px; color: var(--body-text-color-subdued) }
.metrics b { font-size: 15px }
.ends { display: flex; justify-content: space-between; margin-bottom: -10px; font-size: 13px;
  color: var(--body-text-color-subdued) }
.peers { width: 100%; border-collapse: collapse; border: 0 !important }
.peers th, .peers td { text-align: right; padding: 6px 12px !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important }
.peers th:first-child, .peers td:first-child { text-align: left }
.peers tr.own { font-weight: 600 }
"""


def metrics_html(metrics: dict[str, str]) -> str:
    cells = (
        f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>" for name, value in metrics.items()
    )
    return f'<div class="metrics">{"".join(cells)}</div>'


def peers_html(own: str, metrics: dict[str, str], peers: list[Peer]) -> str:
    """Write the table of codecs, with the tokenizer ``own`` first."""
    rows = [("own", f"FlowMo {own}", metrics["file"], metrics.get("PSNR", ""))]
    rows += [("", p.name, f"{p.nbytes:,} bytes" + ", its least" * (not p.fits), f"{p.psnr:.2f} dB") for p in peers]
    lines = (
        f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, *cells in rows
    )
    return f'<table class="peers"><tr><th>codec</th><th>file</th><th>PSNR</th></tr>{"".join(lines)}</table>'


def gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise DemoError("The web page needs gradio. Install it: pip install 'flowmo[demo]'.") from None
    return gradio


def build(demo: Demo) -> Any:
    """Build the page as a ``gradio.Blocks``.

    Raises:
        DemoError: gradio is not installed.
    """
    gr = gradio()
    sampling = demo.tokenizer.config.eval.sampling
    guided = not demo.tokenizer.config.model.mean_velocity
    last_token = demo.tokenizer.code_length - 1

    def on(event: Callable, function: Callable, inputs: list, outputs: list) -> Any:
        """Run ``function`` on an event. An error becomes a warning, and the page stays as it is."""

        @wraps(function)
        def run(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (FlowMoError, OSError, ValueError) as error:
                gr.Warning(html.escape(" ".join(str(error).split()), quote=False), title="That cannot be done")
                return gr.skip()

        # one at a time: a request takes all cores
        return event(run, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_visibility="private")

    def reconstruct(*arguments: Any) -> tuple:
        result = demo.reconstruct(*arguments)
        pair = (result.original or result.decoded, result.decoded)
        return pair, metrics_html(result.metrics), result.file, show_ids(result), result

    def at_equal_bytes(result: Result | None) -> tuple[str, list]:
        peers = demo.at_equal_bytes(result)
        assert result is not None
        images = [(result.original, "original"), (result.decoded, f"FlowMo {demo.name}")]
        return peers_html(demo.name, result.metrics, peers), images + [(peer.image, peer.name) for peer in peers]

    def pair_slider(left: str, right: str, name: str) -> Any:
        gr.HTML(f'<div class="ends"><span>◀ {left}</span><span>{right} ▶</span></div>', padding=False)
        return gr.ImageSlider(elem_id=name, **PAIR)

    with gr.Blocks(title="FlowMo", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as blocks:
        gr.Markdown(f"# FlowMo\nA picture in a short string of token ids, and back. {demo.about()}")
        result = gr.State(None, time_to_live=SECONDS_KEPT)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                kinds = {"file_types": ["image", ".flowmo"], "type": "filepath"}
                file = gr.File(label="Picture, or .flowmo file", height=150, elem_id="upload", **kinds)
                fits = [("whole picture, in tiles", "tile"), ("central square", "crop")]
                fit = gr.Radio(fits, value="tile", label="Encode")
                steps = gr.Slider(1, limits.MAX_STEPS, sampling.sample_steps, step=1, label="Steps")
                scale = sampling.guidance if guided else 1
                guidance = gr.Slider(1, 4, scale, step=0.1, label="Guidance", interactive=guided)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53)
                run = gr.Button("Encode and decode", variant="primary", elem_id="run")
            with gr.Column(scale=2, min_width=400):
                pair = pair_slider("original", "reconstruction", "pair")
                metrics = gr.HTML(elem_id="metrics", padding=False)
                download = gr.DownloadButton("Download .flowmo", elem_id="download")
                with gr.Accordion("Ids of the first tile, a token a line", open=False):
                    ids = gr.Textbox(lines=6, max_lines=12, show_label=False, buttons=["copy"], elem_id="ids")
        request, reconstruction = [file, fit, steps, seed, guidance], [pair, metrics, download, ids, result]

        with gr.Tab("At equal bytes"):
            compare = gr.Button("Compare with other codecs", elem_id="compare")
            others = gr.Gallery(columns=3, elem_id="others", **IMAGES)
            peers = gr.HTML(elem_id="peers", padding=False)
            on(compare.click, at_equal_bytes, [result], [peers, others])
        with gr.Tab("Several samples"):
            with gr.Row(equal_height=True):
                count = gr.Slider(2, limits.MAX_SAMPLES, 6, step=1, label="Samples of the same code", scale=3)
                again = gr.Button("Draw", elem_id="draw", scale=1)
            with gr.Row():
                with gr.Column(scale=2, min_width=400):
                    samples = gr.Gallery(columns=3, elem_id="samples", **IMAGES)
                with gr.Column(scale=1, min_width=300):
                    heat = gr.Image(format="png", interactive=False, show_label=False, elem_id="heat", buttons=[])
                    gr.Markdown("Where they differ: the deviation of a pixel over the samples, bright where great.")
            on(again.click, demo.samples, [result, count, steps, seed, guidance], [samples, heat])
        with gr.Tab("Edit the code"), gr.Row():
            with gr.Column(scale=1, min_width=300):
                first = gr.Slider(0, last_token, 0, step=1, label="First token")
                last = gr.Slider(0, last_token, last_token // 4, step=1, label="Last token")
                how = gr.Radio([RANDOM, FLIPPED, TYPED], value=RANDOM, label="In every tile they become")
                typed = gr.Textbox(lines=4, max_lines=8, label="Ids, a token a line", elem_id="typed")
                change = gr.Button("Change them", elem_id="change")
            with gr.Column(scale=2, min_width=400):
                edited = pair_slider("before", "after", "edited")
            gr.on([first.release, last.release, result.change], show_ids, [result, first, last], [typed], queue=False)
            on(change.click, demo.edit, [result, first, last, how, typed, steps, seed, guidance], [edited])
        if demo.generator is not None:
            with gr.Tab("Generate"):
                classes = [(title, i) for i, title in enumerate(class_titles(demo.generator.vocabulary.classes))]
                with gr.Row():
                    name = gr.Dropdown(classes, value=0 if classes else None, label="Class", elem_id="class")
                    wanted = gr.Slider(1, limits.MAX_GENERATED, 8, step=1, label="Pictures")
                    own = gr.Slider(1, 10, demo.generator.config.generator.guidance, step=0.1, label="Guidance")
                make = gr.Button("Generate", elem_id="generate")
                generated = gr.Gallery(columns=4, elem_id="generated", **IMAGES)
                on(make.click, demo.generate, [name, wanted, seed, own], [generated])

        on(run.click, reconstruct, request, reconstruction)
        # everything shown belongs to the old file: clear it and start on the new one
        empty = (None, "", None, "", None)
        outputs = [*reconstruction, others, peers, samples, heat, edited]
        clear = (*empty, None, "", None, None, None)
        cleared = gr.on([file.change, fit.change], lambda: clear, None, outputs, queue=False)
        on(cleared.then, lambda *a: reconstruct(*a) if a[0] else empty, request, reconstruction)
    return blocks


def serve(demo: Demo, host: str = "127.0.0.1", port: int = 7860) -> Any:
    """Start the web server. The result has the address (``local_url``) and can wait (``block_thread``).

    Raises:
        DemoError: gradio is not installed, or the port is taken.
    """
    gr = gradio()
    blocks = build(demo).queue(max_size=MAX_WAITING, api_open=False)
    fonts = {"font": ["ui-sans-serif", "system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    colours = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
    try:
        # gradio reports an address that it cannot use in many lines
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            max_file_size=MAX_BYTES,
            state_session_capacity=MAX_SESSIONS,
            ssr_mode=False,
            footer_links=[],
            # the machine's own fonts: gradio's default ones come from a network
            theme=gr.themes.Default(**fonts, **colours),
            css=STYLE,
        )
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise DemoError(f"Cannot serve on {host}:{port}: {reason}. Choose another --port or --host.") from None
    return blocks
