"""Export a tokenizer's networks as ONNX or ``torch.export`` graphs, and as a web page that needs no server."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowmo.checkpoint import eight_bit
from flowmo.codec.file import Codec
from flowmo.errors import FlowMoError, one_line
from flowmo.tokenizer import FlowMo

OPSET = 18
NETWORKS = ("encoder", "decoder")
NOT_SENT = -1
"""Id of a sub-token that is not sent, for tokenizers of variable rate."""
PAGE = Path(__file__).parent / "page"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = {
    "ort.wasm.min.mjs": "ort.wasm.min.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}
"""Files of the runtime and their names on the page. Few web servers know ``.mjs``, and browsers then refuse it."""
BYTES = {"float32": 4, "float16": 2, "int8": 1}
MAX_ONNX_BYTES = 2**31 - 2**24
"""Of an ONNX file, which is one protobuf message, without what its nodes take."""
MAX_PAGE_BYTES = 3 * 2**30
"""Of all weights in float32, which have to leave room in the 4 GiB of WebAssembly."""


class ExportError(FlowMoError):
    """A tokenizer that cannot be exported, or a package that is missing. The message is one line."""


class EncoderGraph(nn.Module):
    """Images b × channels × h × w in [−1, 1] to ids, int32 b × tokens × sub-tokens."""

    def __init__(self, tokenizer: FlowMo):
        super().__init__()
        self.encoder, self.quantizer = tokenizer.encoder, tokenizer.quantizer

    def forward(self, images: Tensor) -> Tensor:
        ids = self.quantizer.quantize(self.encoder(images))[1]
        assert ids is not None  # continuous tokenizers are refused before
        return ids.int()


class DecoderGraph(nn.Module):
    """One network pass, equation 3: noised images, ids and a timestep to the velocity, b × channels × h × w.

    ``ids`` is int32 b × tokens × sub-tokens; −1 is a sub-token that is not sent. ``t`` has one element in [0, 1]. So
    has ``condition``: for a decoder of mean velocities it is the end of the step, otherwise 1 for the code and 0 for
    the null code of classifier-free guidance.
    """

    def __init__(self, tokenizer: FlowMo):
        super().__init__()
        self.decoder, self.quantizer = tokenizer.decoder, tokenizer.quantizer
        self.variable_rate, self.mean_velocity = tokenizer.variable_rate, tokenizer.config.model.mean_velocity

    def forward(self, images: Tensor, ids: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        code = self.quantizer.code_from_ids(ids.long().clamp(min=0))
        if self.variable_rate:
            sub_token = self.quantizer.sub_token_of(torch.arange(code.shape[-1]))
            code = code * (ids >= 0)[..., sub_token].to(code.dtype)
        if self.mean_velocity:
            return self.decoder(images, self.decoder.embed_code(code), t, condition)
        keep = condition.expand(images.shape[0])
        return self.decoder(images, self.decoder.embed_code(code, keep), t)


class Graph(NamedTuple):
    """A network with the names of its inputs and its output."""

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    output: str


@torch.no_grad()
def graphs(tokenizer: FlowMo) -> dict[str, Graph]:
    """Encoder and decoder as graphs of dynamic batch, and of dynamic size if the tokenizer has native size.

    Raises:
        ExportError: the tokenizer is continuous, or not in float32 on the CPU.
    """
    model, side = tokenizer.config.model, tokenizer.config.data.image_size
    if tokenizer.quantizer.id_count is None:
        raise ExportError("This tokenizer is continuous. Only tokenizers with ids can be exported.")
    if tokenizer.compiled or tokenizer.device.type != "cpu":
        raise ExportError("Export takes a tokenizer on the CPU that is not compiled.")
    batch, rows, columns = (torch.export.Dim(name, min=1) for name in ("batch", "rows", "columns"))
    height = width = side
    size: dict[int, Any] = {0: batch}
    tokens: dict[int, Any] = {0: batch}
    if tokenizer.native_size:
        # two windows or more: a size of 1 would become a constant
        height, width = (model.patch_size * (n * model.window + 1) for n in (1, 2))
        size |= {2: model.patch_size * rows, 3: model.patch_size * columns}
        tokens |= {1: torch.export.Dim.AUTO}
    images = torch.zeros(2, model.channels, height, width)
    encoder, decoder = EncoderGraph(tokenizer).eval(), DecoderGraph(tokenizer).eval()
    inputs = (images, encoder(images), torch.ones(1), torch.ones(1))
    decoder(*inputs)  # fills caches with real tensors, as encoder did
    names = ("images", "ids", "t", "end" if model.mean_velocity else "keep")
    # With symbolic sizes torch's cache of operators costs more than it saves.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        programs = (
            torch.export.export(encoder, inputs[:1], dynamic_shapes=(size,)),
            torch.export.export(decoder, inputs, dynamic_shapes=(size, tokens, None, None)),
        )
    return {"encoder": Graph(programs[0], names[:1], "ids"), "decoder": Graph(programs[1], names, "velocity")}


def write_graph(graph: Graph, path: Path, dtype: str) -> None:
    """Write a graph as ``.onnx`` with weights of ``dtype``, or as ``.pt2``.

    ``torch.export.load(path).module(check_guards=False)`` reads the latter. Guards would refuse some image sizes.
    """
    if path.suffix == ".pt2":
        torch.export.save(graph.program, path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about itself
        names: dict[str, Any] = {"input_names": graph.inputs, "output_names": [graph.output]}
        program = torch.onnx.export(graph.program, opset_version=OPSET, verbose=False, **names)
    assert program is not None
    model = program.model_proto
    if dtype != "float32":
        shrink(model, torch.float16 if dtype == "float16" else torch.int8)
    path.write_bytes(model.SerializeToString())


def shrink(model: Any, dtype: torch.dtype) -> None:
    """Store an ONNX model's weight matrices as float16 or int8, in place. The runtime widens them once, on loading."""
    from onnx import TensorProto, helper, numpy_helper

    widen = []
    for weight in list(model.graph.initializer):  # scales join them
        array = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or array.ndim != 2 or array.size < eight_bit.SMALLEST:
            continue
        name, narrow, value = weight.name, f"{weight.name}.narrow", torch.from_numpy(array.copy())
        if dtype == torch.float16:
            weight.CopyFrom(numpy_helper.from_array(value.half().numpy(), narrow))
            widen.append(helper.make_node("Cast", [narrow], [name], to=TensorProto.FLOAT))
            continue
        consumer = next(node for node in model.graph.node if name in node.input)
        value, scale = eight_bit.quantize(value, 0 if consumer.op_type == "MatMul" else 1)
        weight.CopyFrom(numpy_helper.from_array(value.numpy(), narrow))
        model.graph.initializer.append(numpy_helper.from_array(scale.numpy(), f"{name}.scale"))
        widen.append(helper.make_node("Cast", [narrow], [f"{name}.wide"], to=TensorProto.FLOAT))
        widen.append(helper.make_node("Mul", [f"{name}.wide", f"{name}.scale"], [name]))
    nodes = [*widen, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def check_page(tokenizer: FlowMo) -> None:
    """Raise ``ExportError`` unless the images are 8-bit RGB, the only ones that the page shows."""
    if not tokenizer.pixels.is_rgb:
        raise ExportError("The page shows 8-bit RGB images, which this tokenizer does not make.")


def describe(tokenizer: FlowMo, name: str) -> dict[str, Any]:
    """Describe, for programs that use the graphs, the layout of ids and files, and how to sample."""
    codec, config = Codec(tokenizer), tokenizer.config
    sampling = config.eval.sampling
    return {
        "name": name,
        "identity": codec.identity.hex(),
        "native": codec.native,
        "cell": codec.cell,
        "tile": codec.tile,
        "tokens": codec.tokens,
        "subTokens": codec.sub_tokens,
        "fewestSubTokens": codec.plane_counts[0],
        "idCount": codec.id_count,
        "bits": codec.bits,
        "meanVelocity": config.model.mean_velocity,
        "guided": config.model.enable_cfg and not config.model.mean_velocity,
        "steps": sampling.sample_steps,
        "solver": sampling.solver,
        "rho": sampling.rho,
        "guidance": 1.0 if config.model.mean_velocity else sampling.guidance,
        "guidanceLow": sampling.guidance_low,
        "guidanceHigh": sampling.guidance_high,
    }


def file_names(kind: str, examples: Sequence[str] = ()) -> list[str]:
    """Return the names of all files that ``export`` writes into its folder."""
    names = ["model.json", *(f"{name}.{'pt2' if kind == 'torch' else 'onnx'}" for name in NETWORKS)]
    if kind == "page":
        names += [path.name for path in PAGE.iterdir()] + [f"runtime/{name}" for name in RUNTIME_FILES.values()]
        names += [f"examples/{name}" for name in examples]
    return names


def export(
    tokenizer: FlowMo,
    output: Path,
    kind: str = "onnx",
    name: str = "tokenizer",
    dtype: str = "float16",
    runtime: Path | None = None,
    examples: Sequence[Path] = (),
) -> list[Path]:
    """Write the networks and ``model.json`` into a folder, when all are made. Returns the files.

    Args:
        kind: ``onnx``, ``torch``, or ``page``: a static web page that runs the ONNX files in the browser.
        name: of the tokenizer, for people.
        dtype: of the weights in ONNX files.
        runtime: unpacked npm package ``onnxruntime-web`` for the page. ``None`` gets ``RUNTIME`` by ``npm pack``.
        examples: images to offer on the page.

    Raises:
        ExportError: the tokenizer has no ids or images that the page cannot show, or is too large; an example or a
            package is missing.
    """
    if missing := [path for path in examples if not path.is_file()]:
        raise ExportError(f"{missing[0]}: no such file.")
    check_size(tokenizer, kind, dtype)
    if kind == "page":
        check_page(tokenizer)
        solver = tokenizer.config.eval.sampling.solver
        if solver != "euler" and not tokenizer.config.model.mean_velocity:
            raise ExportError(f"The page takes Euler's steps, and not {solver}'s. Add eval.sampling.solver=euler.")
    description = describe(tokenizer, name)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as temporary:
        new = Path(temporary)
        if kind == "page":
            vendor(new / "runtime", runtime)
            shutil.copytree(PAGE, new, dirs_exist_ok=True)
            (new / "examples").mkdir()
            description["examples"] = [Path(shutil.copy(path, new / "examples")).name for path in examples]
        files = {name: new / f"{name}.{'pt2' if kind == 'torch' else 'onnx'}" for name in NETWORKS}
        for name, graph in graphs(tokenizer).items():
            write_graph(graph, files[name], dtype)
        description["files"] = {name: about(file) for name, file in files.items()}
        (new / "model.json").write_text(json.dumps(description, indent=1))
        made = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        for path in sorted(made, key=lambda path: path.name == "model.json"):  # last: it names the others' content
            (output / path).parent.mkdir(exist_ok=True)
            (new / path).replace(output / path)
    return [output / path for path in made]


def check_size(tokenizer: FlowMo, kind: str, dtype: str) -> None:
    """Raise ``ExportError`` if an ONNX file or a browser cannot hold the weights."""
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in tokenizer.networks.items()}
    name, most = max(sizes.items(), key=lambda item: item[1])
    if kind != "torch" and most * BYTES[dtype] > MAX_ONNX_BYTES:
        wide = f"The {name} takes {most * BYTES[dtype] / 1e9:.1f} GB in {dtype}, and an ONNX file at most 2.1."
        raise ExportError(f"{wide} Choose a narrower --dtype, or --torch.")
    if kind == "page" and 4 * sum(sizes.values()) > MAX_PAGE_BYTES:
        wide = f"The networks take {4 * sum(sizes.values()) / 1e9:.1f} GB in float32, in which browsers compute"
        raise ExportError(f"{wide}; a page has room for {MAX_PAGE_BYTES / 1e9:.1f}. Export them without --page.")


def about(file: Path) -> dict[str, Any]:
    """Name, size and hash of a file. The page loads a file again if its hash changes."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "hash": digest[:16]}


def npm_package(folder: Path) -> Path:
    """Get the runtime by ``npm pack`` into a folder. Returns the unpacked package."""
    try:
        command = ["npm", "pack", "--silent", RUNTIME]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = one_line(getattr(error, "stderr", "") or error)
        raise ExportError(f"npm cannot get {RUNTIME}: {reason}. Name a copy with --runtime.") from None
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, filter="data")
    return folder / "package"


def vendor(folder: Path, package: Path | None) -> None:
    """Copy the runtime's files from an unpacked npm package, or from the archive of ``npm pack``.

    Raises:
        ExportError: npm is missing or fails, or the package lacks a file.
    """
    with tempfile.TemporaryDirectory() as temporary:
        package = package or npm_package(Path(temporary))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for file, name in RUNTIME_FILES.items():
                shutil.copyfile(package / "dist" / file, folder / name)
        except OSError as error:
            raise ExportError(f"{package} is not onnxruntime-web: {error}.") from None
