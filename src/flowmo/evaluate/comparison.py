"""Measure a FlowMo beside codecs and other tokenizers on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowmo.data import Source
from flowmo.distributed import World
from flowmo.evaluate.codecs import FORMATS, CodecReconstructor
from flowmo.evaluate.measurement import EvaluationError
from flowmo.evaluate.peers import CONTINUOUS, DISCRETE, SIDE, build_peer
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, Reconstructor, measure
from flowmo.evaluate.report import Entry, weights_hash, write_report
from flowmo.evaluate.summary import Summary
from flowmo.model.tiling import Tiling
from flowmo.precision import describe


@dataclass(kw_only=True)
class Comparison:
    """A FlowMo, codecs and other tokenizers, to measure on the same images. All ranks use it together.

    Attributes:
        model: the FlowMo. Its ``steps`` and ``guidance`` are numbers, for the report.
        side: side of the central square crops; ``None`` takes each image at its own size.
        rates: bits per pixel to encode at, by a variable-rate model; none is the full rate.
        peers: names of ``FORMATS``, or ``NAME=WEIGHTS`` as ``build_peer`` takes them. Codecs get the bytes of the ids;
            without a ``side``, at least the bytes of the model's file of the same image.
        limit, enlarge: see ``measure``.
        out: folder of the measurements and the report. The same comparison resumes from it.
        progress: makes a callback from a candidate's name, see ``measure``.

    Raises:
        EvaluationError: a peer cannot work at this size.
        CodecMissingError: the installed Pillow lacks a codec.
    """

    model: FlowMoReconstructor
    source: Source
    evaluators: Evaluators
    side: int | None
    rates: Sequence[float] = ()
    peers: Sequence[str] = ()
    limit: int | None = None
    enlarge: bool = False
    out: Path | None = None
    world: World = World()
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda name: None
    entries: list[Entry] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        tokenizer, side = self.model.tokenizer, self.side or 1
        model = tokenizer.config.model
        self.precision = describe(tokenizer.precision, tokenizer.device)
        self.tiles = len(Tiling(side, side, tokenizer.config.data.image_size).corners)
        bits = tokenizer.config.bits_per_image or 32 * model.code_length * model.context_dim
        self.budget = math.ceil(self.tiles * bits / 8)  # bytes of the ids of a square crop
        self.evaluators.remember = bool(self.peers) or len(self.rates) > 1
        if self.peers and not tokenizer.pixels.is_rgb:
            raise EvaluationError("Codecs and other tokenizers take 8-bit RGB, unlike this model. Leave out --peers.")
        for peer in self.peers:
            name = peer.partition("=")[0]
            if name in FORMATS:
                CodecReconstructor(name, 0)  # report a missing codec before hours of work
            elif name not in (*DISCRETE, *CONTINUOUS):
                build_peer(name, None)  # reports the known names
            elif self.side != SIDE:
                size = f"{self.side} × {self.side}" if self.side else "whole images"
                raise EvaluationError(f"{name} works at {SIDE} × {SIDE}, not at {size}. Add --size {SIDE}.")
        if self.peers and not self.side and self.model.codec is None:
            raise EvaluationError(
                "Codecs beside whole images need a model that writes files. This one has a continuous code."
            )

    def measure(self) -> Iterator[Entry]:
        """Measure one candidate after another."""
        for candidate, metadata in self._candidates():
            measured = measure(
                candidate,
                self.source,
                self.side,
                self.evaluators,
                limit=self.limit,
                batch_size=self.model.tokenizer.config.eval.batch_size,
                device=self.world.device,
                world=self.world,
                enlarge=self.enlarge,
                folder=self.out / "measured" / candidate.name if self.out else None,
                metadata=metadata,
                progress=self.progress(candidate.name),
                pixels=self.model.tokenizer.pixels,
            )
            summary = Summary.of(candidate.name, measured, self.evaluators.features)
            self.entries.append(Entry(candidate, measured, summary))
            yield self.entries[-1]

    def _candidates(self) -> Iterator[tuple[Reconstructor, dict[str, Any]]]:
        """Yield each candidate with the settings that its metrics depend on."""
        model = self.model
        sampling = {"steps": model.steps, "seed": model.seed, "guidance": model.guidance, "precision": self.precision}
        sampling["identity"] = model.tokenizer.weights_identity()
        for rate in self.rates or (None,):
            suffix = "" if rate is None else f" at {rate:g}"
            sampling = sampling | {"bits_per_pixel": rate}
            yield replace(model, name=model.name + suffix, bits_per_pixel=rate), sampling
            if self.side or not self.peers:
                continue
            ours = self.entries[-1].measurement.rows
            budgets = dict(zip(ours["index"].tolist(), ours["file_bits"].div(8).int().tolist(), strict=True))
            for codec in self.peers:
                peer = CodecReconstructor(codec, budgets, at_least=True)
                peer.name += suffix
                yield peer, {"budget": "the model's files", **sampling}
        for name, _, weights in (peer.partition("=") for peer in self.peers if self.side):
            if name in FORMATS:
                for headers in (True, False):
                    yield CodecReconstructor(name, self.budget, headers), {"budget": self.budget}
            else:
                yield build_peer(name, weights or None, self.world.device), {"weights": weights}

    def report(self, source: str, model: str) -> None:
        """Write the report to ``out``. ``source`` and ``model`` are names for its header."""
        assert self.out is not None
        own, side, indices = self.model, self.side, self.entries[0].measurement.rows["index"].tolist()
        networks = {"LPIPS (AlexNet)": self.evaluators.lpips_alex, "LPIPS (VGG)": self.evaluators.lpips_vgg}
        networks["features"] = self.evaluators.features
        square = f"short side resized to {side} (bilinear, antialiased), central square of {side} × {side}"
        header: dict[str, Any] = {
            "pictures": f"{source}: {len(indices)} of {len(self.source)}, evenly spread",
            "protocol": square if side else "each image whole, at its own size",
            "model": f"{model}, tokenizer {own.tokenizer.weights_identity()}",
            **({"tiles a picture": self.tiles} if side else {}),
            "sampling": f"{own.steps} steps, seed {own.seed}, guidance {own.guidance}",
            "precision": self.precision,
            "judges' weights": {name: weights_hash(network) for name, network in networks.items() if network},
        }
        if self.peers:
            header["codecs"] = (
                f"highest quality within {self.budget} bytes an image: whole files, and without their headers"
                if side
                else "lowest quality whose whole file has at least the bytes of the model's file of the same image"
            )
        write_report(self.out, self.entries, self.source, indices, side, header, own.tokenizer.pixels)
