"""Every setting: typed, with one documented default each, named presets, YAML files and ``section.name=value``.

A ``Config`` is immutable and always valid: building one with an unknown name, a wrong type or an impossible value
raises ``ConfigError`` with a sentence that says what to write instead. The names are those of the authors' release
where it has one; its other spellings (``model.mup_width``, ``eval.sampling.cfg`` …) are translated by ``ALIASES``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowmo.config.checks import check
from flowmo.config.overrides import ALIASES, convert, leaves, load_yaml, parse_value, shorten, shown, translate
from flowmo.config.presets import GENERATOR_PRESETS, PRESETS
from flowmo.config.sections import (
    CHECKPOINTED,
    FIELDS,
    HIDING_SCHEDULES,
    REVEALING_ORDERS,
    SECTIONS,
    SOLVERS,
    ConfigError,
    DataConfig,
    EvalConfig,
    GeneratorConfig,
    ModelConfig,
    OptConfig,
    SamplingConfig,
    Span,
    TrainerConfig,
)
from flowmo.model.transformer import Shape
from flowmo.model.windowed import WindowedShape

__all__ = [
    "ALIASES",
    "CHECKPOINTED",
    "FIELDS",
    "GENERATOR_PRESETS",
    "HIDING_SCHEDULES",
    "PRESETS",
    "REVEALING_ORDERS",
    "SOLVERS",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GeneratorConfig",
    "ModelConfig",
    "OptConfig",
    "SamplingConfig",
    "Span",
    "TrainerConfig",
    "flatten",
    "preset",
]

MAX_YAML_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a tokenizer or a generator and its training.

    Raises:
        ConfigError: on construction, where a value cannot work.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    opt: OptConfig = field(default_factory=OptConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        check(self)

    @property
    def encoder_shape(self) -> Shape:
        m = self.model
        return Shape(
            m.enc_hidden_size, m.enc_num_heads, m.enc_depth, m.patch_size, m.mlp_ratio, m.code_layout, m.enable_mup
        )

    @property
    def decoder_shape(self) -> Shape:
        m = self.model
        return Shape(
            m.hidden_size,
            m.num_heads,
            m.dec_depth,
            m.patch_size,
            m.mlp_ratio,
            m.code_layout,
            m.enable_mup,
            m.prediction,
            m.initial_gate,
            m.mean_velocity,
        )

    def windowed_shape(self, network: str) -> WindowedShape:
        """Of the ``encoder`` or the ``decoder``, with ``model.network=windowed``."""
        m = self.model
        sizes = (m.hidden_size, m.num_heads, m.dec_depth)
        if network == "encoder":
            sizes = (m.enc_hidden_size, m.enc_num_heads, m.enc_depth)
        return WindowedShape(*sizes, m.conv_depth, m.window, m.mlp_ratio, m.prediction)

    @property
    def stage(self) -> str:
        """Of training: ``pretrain`` (1A), ``posttrain`` (1B), ``distill`` (1C) or ``generator`` (2)."""
        if self.generator.train:
            return "generator"
        if self.opt.teacher:
            return "distill"
        return "posttrain" if self.model.posttrain_sample else "pretrain"

    def architecture(self) -> dict[str, Any]:
        """The model's settings that make it the function that it is; two models of other training can share them."""
        return _architecture(self.model)

    def generator_architecture(self) -> dict[str, Any]:
        """The same of a generator."""
        return _architecture(self.generator)

    @property
    def bits_per_image(self) -> float | None:
        """Bits of one picture's ids as they are stored, or ``None`` for a continuous bottleneck.

        An id takes whole bits: one of 125 takes 7, not log2(125).
        """
        m = self.model
        levels = max(m.fsq_levels, 2)
        channels = max(int(m.codebook_size_for_entropy / math.log2(levels) + 1e-9), 1)  # of an id of fsq
        bits_per_token = {
            "lfq": m.context_dim,
            "bsq": m.context_dim,
            "fsq": m.context_dim // channels * (levels**channels - 1).bit_length(),
            "vq": m.vq_sub_tokens * (max(m.vq_entries, 2) - 1).bit_length(),
        }
        bits = bits_per_token.get(m.quantization_type)
        return None if bits is None else float(m.code_length * bits)

    @property
    def bits_per_pixel(self) -> float | None:
        bits = self.bits_per_image
        return None if bits is None else bits / self.data.image_size**2

    def override(self, *assignments: str, **_: Any) -> Config:
        """A copy with ``section.name=value`` assignments applied, e.g. ``config.override("opt.lr=3e-4")``."""
        values = {}
        for assignment in assignments:
            name, equals, value = assignment.partition("=")
            if not equals:
                raise ConfigError(
                    f"{shown(assignment)} is not a setting; write it as section.name=value, e.g. opt.lr=1e-4"
                )
            values[name] = parse_value(name, value)
        return self.updated(values)

    def updated(self, values: Mapping[str, Any]) -> Config:
        """A copy with the settings of a flat mapping ``{"section.name": value}`` replaced."""
        flat = flatten(self)
        for name, value in values.items():
            for real, translated in translate(name, value).items():
                flat[real] = convert(real, translated, FIELDS[real].type)
        return type(self)(**{name: _section(kind, f"{name}.", flat) for name, kind in SECTIONS.items()})

    def to_dict(self) -> dict[str, Any]:
        """Nested sections of plain values, as ``from_dict`` takes them."""

        def plain(tree: dict[str, Any]) -> dict[str, Any]:
            return {
                name: plain(v) if isinstance(v, dict) else str(v) if isinstance(v, Span) else v
                for name, v in tree.items()
            }

        return plain(dataclasses.asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Config:
        """From nested sections, as in a YAML file; what is not named keeps its default."""
        if not isinstance(tree, Mapping):
            raise ConfigError(f"settings are sections with names and values, not a {type(tree).__name__}")
        return cls().updated(dict(leaves(tree)))

    @classmethod
    def from_yaml(cls, path: str | Path, base: Config | None = None) -> Config:
        """From a YAML file over ``base``; a top-level ``preset: NAME`` starts from that preset instead.

        Raises:
            ConfigError: the file cannot be read, is no mapping, or holds a setting that does not work.
        """
        try:
            raw = Path(path).read_bytes()
            if len(raw) > MAX_YAML_BYTES:
                raise ConfigError(f"{path} has {len(raw)} bytes; a settings file has at most {MAX_YAML_BYTES}")
            tree = load_yaml(raw) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read settings from {path}: {shorten(error)}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} holds no settings; write sections such as 'model:' with 'name: value' below")
        name = tree.pop("preset", None)
        start = preset(str(name)) if name is not None else base or cls()
        return start.updated(dict(leaves(tree)))


def preset(name: str) -> Config:
    """A named configuration: of a tokenizer ``nano``, ``small``, ``lo`` or ``hi``, of a generator ``maskgit`` or
    ``maskgit_nano``.

    Raises:
        ConfigError: no preset of that name.
    """
    presets = PRESETS | GENERATOR_PRESETS
    if name not in presets:
        raise ConfigError(f"no preset {shown(name)}; the presets are {', '.join(presets)}")
    return Config.from_dict(presets[name])


def _architecture(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if not f.metadata["training"]}


def flatten(config: Config) -> dict[str, Any]:
    return dict(leaves(dataclasses.asdict(config)))


def _section(section: type, prefix: str, flat: Mapping[str, Any]) -> Any:
    """A section, and those in it, of the values in ``flat``."""
    values = {}
    for f in dataclasses.fields(section):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            values[f.name] = _section(f.type, f"{prefix}{f.name}.", flat)
        else:
            values[f.name] = flat[f"{prefix}{f.name}"]
    return section(**values)
