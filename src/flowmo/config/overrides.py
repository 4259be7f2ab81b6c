"""From text to settings: YAML, ``section.name=value``, the release's spellings, and advice for wrong ones."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowmo.config.fields import ConfigError, Span, shown
from flowmo.config.sections import FIELDS
from flowmo.errors import one_line

MAX_DIGITS = 400
MAX_YAML_BYTES = 1 << 20


def _renamed(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {name: value}


def _width(prefix: str) -> Callable[[Any], dict[str, Any]]:
    return lambda w: {f"model.{prefix}hidden_size": 192 * int(w), f"model.{prefix}num_heads": 12}


def _schedule(value: Any) -> dict[str, Any]:
    return {"eval.sampling.rho": 1.0 if value == "linear" else 1 / float(str(value).removeprefix("pow_"))}


def _interval(value: Any) -> dict[str, Any]:
    """Convert the release's EDM noise levels σ, (low, high), to timesteps t = σ / (1 + σ)."""
    low, high = (0.0, math.inf) if value is None else ast.literal_eval(str(value))
    return {
        "eval.sampling.guidance_low": low / (1 + low),
        "eval.sampling.guidance_high": 1.0 if math.isinf(high) else high / (1 + high),
    }


ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.mup_width": _width(""),
    "model.enc_mup_width": _width("enc_"),
    "data.channels": _renamed("model.channels"),
    "global_seed": _renamed("trainer.seed"),
    "trainer.max_steps": _renamed("trainer.duration"),
    "opt.warmup_steps": _renamed("opt.warmup"),
    "opt.freeze_encoder": lambda value: {"opt.freeze_encoder_after": 0} if value else {},
    "data.imagenet_train_tar": _renamed("data.train"),
    "data.imagenet_train_index": _renamed("data.train_index"),
    "data.imagenet_val_tar": _renamed("data.val"),
    "data.imagenet_val_index": _renamed("data.val_index"),
    "data.eval_batch_size": _renamed("eval.batch_size"),
    "eval.sampling.cfg": _renamed("eval.sampling.guidance"),
    "eval.sampling.schedule": _schedule,
    "eval.sampling.cfg_interval": _interval,
}
"""The release's spellings of settings that have another name or form here."""


class _Loader(yaml.SafeLoader):
    """Plain values without aliases: a few lines of aliases can stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has an alias (*name); settings have none")
        return super().compose_node(parent, index)

    def construct_number(self, node: Any) -> int | float:
        if len(node.value) > MAX_DIGITS:  # parsing takes quadratic time
            message = f"a number of {len(node.value)} digits"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def load_yaml(text: str | bytes) -> Any:
    """Parse a YAML document of plain values.

    Raises:
        yaml.YAMLError: it is not one. PyYAML raises many other errors for impossible dates, numbers and nesting.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a settings file. Raises ``ConfigError`` if it is not one."""
    try:
        raw = Path(path).read_bytes()
        if len(raw) > MAX_YAML_BYTES:
            raise ConfigError(f"{path} has {len(raw)} bytes. A settings file has at most {MAX_YAML_BYTES}.")
        tree = load_yaml(raw) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read settings from {path}: {one_line(error, 200)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} contains no settings. Write sections such as 'model:' with 'name: value' below.")
    return tree


def parse_value(name: str, text: str) -> Any:
    """Parse the value of an assignment on the command line. Text settings take it verbatim, without quotes."""
    if name in FIELDS and type(FIELDS[name].default) is str:
        return text.strip("'\"")
    try:
        return load_yaml(text) if len(text) < 1000 else text
    except yaml.YAMLError:
        return text


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full name, value) of nested sections."""
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if not any(known.startswith(f"{full}.") for known in (*FIELDS, *ALIASES)):
                raise ConfigError(f"There is no section {shown(full)}. {_nearest(full, _sections())}")
            yield from leaves(value, f"{full}.")
        else:
            yield full, value


def _sections() -> list[str]:
    return sorted({name.rpartition(".")[0] for name in FIELDS})


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(known)}."


def translate(name: str, value: Any) -> dict[str, Any]:
    """Return real name and value of a setting that may have the release's spelling."""
    if name in FIELDS:
        return {name: value}
    if name in ALIASES:
        try:
            return ALIASES[name](value)
        except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
            raise ConfigError(f"{name}={shown(value)} is not a value that {name} takes.") from None
    section, _, last = name.rpartition(".")
    elsewhere = [known for known in FIELDS if known.rpartition(".")[2] == last]
    siblings = [known for known in (*FIELDS, *ALIASES) if known.rpartition(".")[0] == section]
    advice = (
        f"Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else _nearest(name, siblings or _sections())
    )
    raise ConfigError(f"There is no setting {shown(name)}. {advice}")


WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def convert(name: str, value: Any) -> Any:
    """Convert ``value`` to the setting's type without loss.

    Raises:
        ConfigError: the value has another type.
    """
    default = FIELDS[name].default
    kind: Any = type(default)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind not in (bool, str) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            if kind is Span or kind is type(value) is int:
                return kind(value)
            number = float(value)  # YAML 1.1 reads 1e-4 as text
            if math.isfinite(number) and kind(number) == number:
                return kind(number)
        except (ValueError, OverflowError):
            pass
    words = WORDS.get(kind, "a length in images, steps or epochs")
    example = repr(str(default)) if isinstance(default, str) else default
    raise ConfigError(f"{name}={shown(value)} does not work. Write {words}, for example {name}={example}.")
