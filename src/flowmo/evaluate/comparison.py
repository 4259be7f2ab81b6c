"""Measure a FlowMo beside codecs and other tokenizers on the same images."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from flowmo.data import Source
from flowmo.distributed import World
from flowmo.evaluate.codecs import FORMATS, CodecReconstructor
from flowmo.evaluate.measurement import EvaluationError
from flowmo.evaluate.reconstruction import Evaluators, FlowMoReconstructor, Reconstructor, measure
from flowmo.evaluate.report import Entry, write_report
from flowmo.evaluate.summary import Summary
from flowmo.model.tiling import Tiling
from flowmo.precision import describe

MEASURED = "measured"
"""Folder of the measurements, inside the report's folder."""
PEERS = "reproduce.peers"
"""Module of the published tokenizers, in a checkout of the repository."""


@dataclass(kw_only=True)
class Comparison:
    """A FlowMo, codecs and other tokenizers, to measure on the same images. All ranks use it together.

    Attributes:
        model: the FlowMo. Its ``steps`` and ``guidance`` are numbers, for the report.
        side: side of the central square crops; ``None`` takes each image at its own size.
        evaluators: the networks of the metrics, by default none. They can be set until ``measure``.
        rates: bits per pixel to encode at, by a variable-rate model; none is the full rate.
        peers: names of ``FORMATS``, or tokenizers as ``open_peer`` takes them. Codecs get the bytes of the ids; without
            a ``side``, at least the bytes of the model's file of the same image.
        limit, enlarge: see ``measure``.
        out: folder of the measurements and the report. The same comparison resumes from it.
        progress: makes a callback from a candidate's name, see ``measure``.

    Raises:
        EvaluationError: a peer is unknown or cannot work at this size.
        CodecMissingError: the installed Pillow lacks a codec.
    """

    model: FlowMoReconstructor
    source: Source
    side: int | None
    evaluators: Evaluators = field(default_factory=Evaluators)
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
        if self.peers and not tokenizer.pixels.is_rgb:
            raise EvaluationError("Codecs and other tokenizers take 8-bit RGB, unlike this model. Leave out --peers.")
        if self.peers and not self.side and self.model.codec is None:
            raise EvaluationError(
                "Codecs beside whole images need a model that writes files. This one has a continuous code."
            )
        self.precision = describe(tokenizer.precision, tokenizer.device)
        native = tokenizer.native_size
        self.tiles = 1 if native else len(Tiling(side, side, tokenizer.config.data.image_size).corners)
        bits = tokenizer.config.bits_per_image or 32 * model.code_length * model.context_dim
        tokens = self.tiles * tokenizer.tokens(side, side)
        self.budget = math.ceil(tokens * bits / model.code_length / 8)  # bytes of the ids of a square crop
        square = f"Short side resized to {side} (bilinear, antialiased), central square of {side} × {side}."
        self.protocol = square if self.side else "Each image whole, at its own size."
        self.others = [other for peer in self.peers for other in self._open(peer)]  # any error before hours of work

    def _open(self, peer: str) -> Iterator[tuple[Reconstructor, dict[str, Any]]]:
        """Yield the candidates of a peer, with the settings that their metrics depend on."""
        name, _, weights = peer.partition("=")
        if name in FORMATS and weights:
            raise EvaluationError(f"{peer}: {name} takes no value, for its quality follows from the bytes.")
        if name in FORMATS and self.side:
            for headers in (True, False):
                yield CodecReconstructor(name, self.budget, headers), {"budget": self.budget}
        elif name in FORMATS:
            yield CodecReconstructor(name, {}, at_least=True), {"budget": "the model's files"}
        elif self.side:
            yield open_peer(name, weights, self.side, self.world), {"weights": weights or None}
        else:
            raise EvaluationError(f"{name} does not stand beside whole images. Choose from {', '.join(FORMATS)}.")

    def measure(self) -> Iterator[Entry]:
        """Measure the model at each rate, for whole images with the codecs at its bytes, then all other candidates."""
        self.evaluators.cache_originals = bool(self.peers) or len(self.rates) > 1
        for rate in self.rates or (None,):
            suffix = "" if rate is None else f" at {rate:g}"
            settings = self._sampling() | {"bits_per_pixel": rate}
            entry = self._measure(replace(self.model, name=self.model.name + suffix, bits_per_pixel=rate), settings)
            yield entry
            if not self.side and self.others:
                rows = entry.measurement.rows
                budgets = dict(zip(rows["index"].tolist(), rows["file_bits"].div(8).int().tolist(), strict=True))
                for codec, metadata in self.others:
                    assert isinstance(codec, CodecReconstructor)
                    yield self._measure(replace(codec, budget=budgets, suffix=suffix), metadata | settings)
        for candidate, metadata in self.others if self.side else ():
            yield self._measure(candidate, metadata)

    def _sampling(self) -> dict[str, Any]:
        """Settings that the model's metrics depend on, but for the rate."""
        model, tokenizer = self.model, self.model.tokenizer
        sampling = {"steps": model.steps, "seed": model.seed, "guidance": model.guidance, "precision": self.precision}
        sampling |= {"identity": tokenizer.weights_identity(), "settings": str(tokenizer.config.eval.sampling)}
        if model.codec and model.codec.context:
            sampling["context"] = hashlib.sha256(model.codec.context.save()).hexdigest()
        return sampling

    def _measure(self, candidate: Reconstructor, metadata: dict[str, Any]) -> Entry:
        """Measure a candidate, and keep its entry. ``metadata``: settings that its metrics depend on."""
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
            folder=self.out / MEASURED / candidate.name if self.out else None,
            metadata=metadata,
            progress=self.progress(candidate.name),
            pixels=self.model.tokenizer.pixels,
        )
        summary = Summary.of(candidate.name, measured, self.evaluators.features)
        self.entries.append(Entry(candidate, measured.without_features(), summary))
        return self.entries[-1]

    def report(self, source: str, model: str) -> None:
        """Write the report to ``out``. ``source`` and ``model`` are names for its header."""
        assert self.out is not None
        side, count = self.side, self.entries[0].summary.images
        header = {
            "images": f"{source}: {count} of {len(self.source)}, evenly spread",
            "protocol": self.protocol,
            "model": f"{model}, tokenizer {self.model.tokenizer.weights_identity()}",
            **({"tiles per image": str(self.tiles)} if side and not self.model.tokenizer.native_size else {}),
            "sampling": f"{self.model.steps} steps, seed {self.model.seed}, guidance {self.model.guidance}",
            "precision": self.precision,
            "networks of the metrics": ", ".join(self.evaluators.describe().values()),
        }
        if self.peers:
            header["codecs"] = (
                f"highest quality within {self.budget} bytes an image: whole files, and without their headers"
                if side
                else "lowest quality whose whole file has at least the bytes of the model's file of the same image"
            )
        write_report(self.out, self.entries, self.source, side, header, self.model.tokenizer.pixels)


def open_peer(name: str, weights: str, side: int, world: World) -> Reconstructor:
    """Build another tokenizer from the name MODULE:NAME, or from the name of a published one.

    ``MODULE.build_peer(name, weights, device)`` builds it. Modules are also found in the current folder. A
    tokenizer of one image size has it as its ``side``.

    Raises:
        EvaluationError: there is no such module, or the tokenizer takes images of another size.
    """
    module, _, short = name.rpartition(":")
    sys.path.insert(0, "")  # as python -m does
    try:
        build = import_module(module or PEERS).build_peer
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{name} is not a codec ({', '.join(FORMATS)}), and {module or PEERS} cannot build it ({error}). "
            "Run the command in the folder of that module; for published tokenizers, a checkout of the repository."
        ) from None
    finally:
        sys.path.remove("")
    peer: Reconstructor = build(short, weights or None, world.device)
    needed = getattr(peer, "side", side)
    if needed != side:
        raise EvaluationError(f"{name} works at {needed} × {needed}, not at {side} × {side}. Add --size {needed}.")
    return peer
