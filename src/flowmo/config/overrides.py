"""From text to settings: YAML, ``section.name=value``, the release's spellings, and what to say of wrong ones."""

from __future__ import annotations

import ast
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from flowmo.config.sections import FIELDS, ConfigError, Span

MAX_DIGITS = 400


def _width(prefix: str) -> Callable[[Any], dict[str, Any]]:
    return lambda w: {f"model.{prefix}hidden_size": 192 * int(w), f"model.{prefix}num_heads": 12}


def _schedule(value: Any) -> dict[str, Any]:
    if value == "linear":
        return {"eval.sampling.rho": 1.0}
    return {"eval.sampling.rho": 1 / float(str(value).removeprefix("pow_"))}


def _interval(value: Any) -> dict[str, Any]:
    """The release gives EDM noise levels σ, (low, high); timesteps are t = σ / (1 + σ)."""
    low, high = (0.0, math.inf) if value is None else ast.literal_eval(str(value))
    return {
        "eval.sampling.guidance_low": low / (1 + low),
        "eval.sampling.guidance_high": 1.0 if math.isinf(high) else high / (1 + high),
    }


ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.mup_width": _width(""),
    "model.enc_mup_width": _width("enc_"),
    "global_seed": lambda value: {"trainer.seed": value},
    "trainer.max_steps": lambda value: {"trainer.duration": value},
    "opt.warmup_steps": lambda value: {"opt.warmup": value},
    "opt.freeze_encoder": lambda value: {"opt.freeze_encoder_after": 0} if value else {},
    "data.imagenet_train_tar": lambda value: {"data.train": value},
    "data.imagenet_train_index": lambda value: {"data.train_index": value},
    "data.imagenet_val_tar": lambda value: {"data.val": value},
    "data.imagenet_val_index": lambda value: {"data.val_index": value},
    "data.eval_batch_size": lambda value: {"eval.batch_size": value},
    "eval.sampling.cfg": lambda value: {"eval.sampling.guidance": value},
    "eval.sampling.schedule": _schedule,
    "eval.sampling.cfg_interval": _interval,
}
"""The release's spellings of settings that have another name or form here."""


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if not any(known.startswith(f"{full}.") for known in (*FIELDS, *ALIASES)):
                raise ConfigError(f"there is no section {shown(full)}{nearest(full, sections())}")
            yield from leaves(value, f"{full}.")
        else:
            yield full, value


def sections() -> list[str]:
    return sorted({name.rpartition(".")[0] for name in FIELDS})


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no aliases: a few lines of them can stand for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "it has an alias (*name); settings have none")
        return super().compose_node(parent, index)

    def construct_number(self, node: Any) -> int | float:
        if len(node.value) > MAX_DIGITS:  # reading it takes the square of its length
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits", node.start_mark
            )
        kind = node.tag.rpartition(":")[2]
        return super().construct_yaml_int(node) if kind == "int" else super().construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def load_yaml(text: str | bytes) -> Any:
    """The value of a YAML document of plain values.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        # What PyYAML's constructors raise for dates, numbers and words that are none, and for deep nesting.
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def shorten(value: object) -> str:
    """One line of at most 200 characters."""
    line = " ".join(str(value).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def shown(value: object) -> str:
    """A value in a message. A whole number can have more digits than Python prints."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def nearest(name: str, known: Iterable[str]) -> str:
    if len(name) > 100:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def translate(name: str, value: Any) -> dict[str, Any]:
    """Real name and value of a setting that may be spelt as in the release."""
    if name in FIELDS:
        return {name: value}
    if name in ALIASES:
        try:
            return ALIASES[name](value)
        except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
            raise ConfigError(f"{name}={shown(value)} is not a value that {name} takes") from None
    section, _, last = name.rpartition(".")
    elsewhere = [known for known in FIELDS if known.rpartition(".")[2] == last]
    if elsewhere:
        raise ConfigError(f"there is no setting {shown(name)}; did you mean {' or '.join(map(repr, elsewhere))}?")
    siblings = [known for known in (*FIELDS, *ALIASES) if known.rpartition(".")[0] == section]
    raise ConfigError(f"there is no setting {shown(name)}{nearest(name, siblings or sections())}")


def parse_value(name: str, text: str) -> Any:
    """The value of an assignment on the command line; text fields take it as it stands."""
    known = FIELDS.get(name)
    if known is not None and known.type is str:
        return text.strip("'\"")
    try:
        return load_yaml(text) if len(text) < 1000 else text
    except yaml.YAMLError:
        return text


def convert(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the setting's type, where that loses nothing.

    Raises:
        ConfigError: the value is of another type.
    """
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if kind is Span and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return Span(value)
        except ValueError:
            raise ConfigError(
                f"{name}={shown(value)} does not work; write a length such as {name}='{FIELDS[name].default}', "
                "in images, steps or epochs"
            ) from None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as text
            number = float(value)
            number = value if isinstance(value, int) and kind is int else number
        except (ValueError, OverflowError):
            number = math.nan
        if kind is float and math.isfinite(number):
            return float(number)
        if kind is int and math.isfinite(number) and number == int(number):
            return int(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Span: "a length"}[
        kind
    ]
    raise ConfigError(f"{name}={shown(value)} does not work; write {wanted}, for example {name}={FIELDS[name].default}")
