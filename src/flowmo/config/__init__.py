"""Every setting, with presets, YAML files and ``section.name=value`` on the command line.

Settings are plain frozen dataclasses. tyro, pydantic and OmegaConf read types and ranges too, but the lines here are
for the release's spellings, advice in error messages and files from strangers, which none of them has.

A ``Config`` is immutable and always valid. Settings of the authors' release keep its names; ``overrides.ALIASES``
translates its other spellings (``model.mup_width``, ``eval.sampling.cfg`` …).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from flowmo.config.fields import ConfigError, Duration, shown
from flowmo.config.overrides import NONE, convert, leaves, read_yaml, translate
from flowmo.config.rules import broken
from flowmo.config.sections import (
    FIELDS,
    SOLVERS,
    UNMASKING_ORDERS,
    DataConfig,
    GeneratorConfig,
    ModelConfig,
    OptConfig,
    SamplingConfig,
    Sections,
    TrainerConfig,
    flatten,
)

__all__ = [
    "FIELDS",
    "FINE_TUNING",
    "GENERATOR_PRESETS",
    "OWN",
    "PRESETS",
    "SOLVERS",
    "UNMASKING_ORDERS",
    "Config",
    "ConfigError",
    "DataConfig",
    "Duration",
    "GeneratorConfig",
    "ModelConfig",
    "OptConfig",
    "SamplingConfig",
    "TrainerConfig",
    "flatten",
    "own_settings",
    "preset",
]

PRESETS, GENERATOR_PRESETS, FINE_TUNING = read_yaml(Path(__file__).with_name("presets.yaml")).values()
OWN = (
    *("data.image_size", "data.crop_sizes", "data.bit_depth", "data.value_range", "model.", "eval.sampling."),
    *("opt.schedule", "opt.anchor", "opt.loss_space", "opt.perceptual_channels"),
)
"""Prefixes of the settings that belong to a model: what it is, its images, the form of its loss, and how it samples."""


@dataclass(frozen=True, kw_only=True)
class Config(Sections):
    """All settings of a tokenizer or a generator and its training.

    Raises:
        ConfigError: on construction, if settings cannot work together.
    """

    def __post_init__(self) -> None:
        for sentence in broken(self):
            raise ConfigError(sentence)

    @property
    def stage(self) -> str:
        """Stage of training: ``pretrain`` (1A), ``posttrain`` (1B), ``distill`` (1C) or ``generator`` (2)."""
        if self.generator.train:
            return "generator"
        if self.opt.teacher:
            return "distill"
        return "posttrain" if self.model.posttrain_sample else "pretrain"

    def architecture(self) -> dict[str, Any]:
        """Return the tokenizer's settings that define its function. Models of different training can share them.

        A windowed network takes images of any size, so ``code_length`` is left out.
        """
        settings = _architecture(self.model)
        if self.model.network == "windowed":
            del settings["code_length"]
        return settings

    def generator_architecture(self) -> dict[str, Any]:
        """Return the generator's settings that define its function."""
        return _architecture(self.generator)

    @property
    def bits_per_image(self) -> float | None:
        """Bits of one image's ids as they are stored, or ``None`` for a continuous bottleneck.

        An id takes whole bits: one of 125 takes 7, not log2(125).
        """
        if self.model.ids_per_token is None:
            return None
        sub_tokens, id_count = self.model.ids_per_token
        return float(self.model.code_length * sub_tokens * (id_count - 1).bit_length())

    @property
    def bits_per_pixel(self) -> float | None:
        bits = self.bits_per_image
        return None if bits is None else bits / self.data.image_size**2

    def override(self, *assignments: str) -> Self:
        """Return a copy with ``section.name=value`` assignments applied, as in ``config.override("opt.lr=3e-4")``."""
        values = {}
        for assignment in assignments:
            name, equals, value = assignment.partition("=")
            if not equals:
                advice = "Write it as section.name=value, such as opt.lr=1e-4."
                raise ConfigError(f"{shown(assignment)} is not a setting. {advice}")
            values[name] = value.strip("'\"")
        return self.updated(values)

    def updated(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with the settings of a flat mapping ``{"section.name": value}`` replaced.

        A batch per process (``data.batch_size``) also replaces the earlier batch of all processes.
        """
        flat, new = flatten(self), dict[str, Any]()
        for name, value in values.items():
            new |= {real: convert(real, translated) for real, translated in translate(name, value).items()}
        if new.get("data.batch_size"):
            flat["data.global_batch_size"] = 0
        flat |= new
        return _build(type(self), flat)

    def to_dict(self) -> dict[str, Any]:
        """Nested sections of plain values, as ``from_dict`` takes them."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """From nested sections, as in a YAML file. Settings that are not named keep their defaults."""
        if not isinstance(tree, Mapping):
            raise ConfigError(f"Settings are sections with names and values, not a {type(tree).__name__}.")
        return cls().updated(dict(leaves(tree)))

    @classmethod
    def from_yaml(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """From a YAML file over ``base``. A top-level ``preset: NAME`` starts from that preset instead.

        Raises:
            ConfigError: the file cannot be read, is not a mapping, or contains a setting that does not work.
        """
        tree = read_yaml(path)
        name = tree.pop("preset", None)
        start = base or cls() if name in NONE else preset(str(name))
        return start.updated(dict(leaves(tree)))


def preset(name: str) -> Config:
    """Return a named configuration, of a tokenizer (``PRESETS``) or a generator (``GENERATOR_PRESETS``).

    Raises:
        ConfigError: there is no preset of that name.
    """
    presets = PRESETS | GENERATOR_PRESETS
    if name not in presets:
        raise ConfigError(f"There is no preset {shown(name)}. The presets are {', '.join(presets)}.")
    return Config.from_dict(presets[name])


def own_settings(model: Config, base: Config) -> Config:
    """Return ``base`` with the settings that belong to a trained model, for its stage 1A.

    A model of stage 1A also keeps its perceptual loss.
    """
    prefixes = OWN if model.model.posttrain_sample else (*OWN, "opt.lpips_")
    values = {name: value for name, value in flatten(model).items() if name.startswith(prefixes)}
    return base.updated({**values, "model.posttrain_sample": False, "model.train": "all"})


def _architecture(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if not f.metadata["training"]}


def _build(kind: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a section and its sub-sections from flat values."""
    values = {}
    for f in dataclasses.fields(kind):
        name = prefix + f.name
        values[f.name] = flat[name] if name in flat else _build(cast(type, f.default_factory), flat, f"{name}.")
    return kind(**values)
