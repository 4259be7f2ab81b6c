"""From text to settings: YAML, ``section.name=value``, the release's spellings, and advice for wrong ones."""

import ast
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowmo.config.fields import ConfigError, Duration, shown
from flowmo.config.sections import FIELDS
from flowmo.errors import one_line

MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 8


def _renamed(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {name: value}


def _width(prefix: str) -> Callable[[Any], dict[str, Any]]:
    return lambda w: {f"model.{prefix}hidden_size": 192 * int(w), f"model.{prefix}num_heads": 12}


def _schedule(value: Any) -> dict[str, Any]:
    return {"eval.sampling.rho": 1.0 if value == "linear" else 1 / float(str(value).removeprefix("pow_"))}


NONE = (None, "", "~", "null")
"""What YAML and the command line write for no value."""


def _interval(value: Any) -> dict[str, Any]:
    """Convert the release's EDM noise levels σ, (low, high), to timesteps t = σ / (1 + σ)."""
    low, high = (0.0, math.inf) if value in NONE else map(float, ast.literal_eval(str(value)))
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
    "opt.freeze_encoder": lambda value: {"opt.freeze_encoder_after": 0} if _boolean(value) else {},
    "data.imagenet_train_tar": _renamed("data.train"),
    "data.imagenet_train_index": _renamed("data.train_index"),
    "data.imagenet_val_tar": _renamed("data.val"),
    "data.imagenet_val_index": _renamed("data.val_index"),
    "data.eval_batch_size": _renamed("eval.batch_size"),
    "eval.pictures": _renamed("eval.images"),
    "eval.sampling.cfg": _renamed("eval.sampling.guidance"),
    "eval.sampling.schedule": _schedule,
    "eval.sampling.cfg_interval": _interval,
}
"""The release's spellings of settings that have another name or form here, and a former name."""

IMAGE_IS_A_VALUE = ("model.prediction", "opt.loss_space", "opt.distill_towards")
"""Files of earlier versions write ``picture`` for this value of these settings."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a settings file as nested mappings of text. Raises ``ConfigError`` if it is not one."""
    try:
        raw = Path(path).read_bytes()
        if len(raw) > MAX_YAML_BYTES:
            raise ValueError(f"it has {len(raw)} bytes, more than {MAX_YAML_BYTES}")
        depth = 0
        for event in yaml.parse(raw):
            if isinstance(event, yaml.AliasEvent):  # a few can fill any memory
                raise ValueError("it has an alias (*name); settings have none")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:  # the parser's time grows with the square of the depth
                raise ValueError(f"it nests lists or mappings more than {MAX_YAML_DEPTH} deep")
        tree = yaml.load(raw, yaml.BaseLoader) or {}
    except (OSError, yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"Cannot read settings from {path}: {one_line(error, 200)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} contains no settings. Write sections such as 'model:' with 'name: value' below.")
    return tree


SECTIONS = dict.fromkeys(name.rpartition(".")[0] for name in FIELDS)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full name, value) of nested sections."""
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if not isinstance(value, Mapping):
            yield full, value
        elif full in SECTIONS:
            yield from leaves(value, f"{full}.")
        else:
            raise ConfigError(f"There is no section {shown(full)}. There are {', '.join(SECTIONS)}.")


def translate(name: str, value: Any) -> dict[str, Any]:
    """Return real name and value of a setting that may have the release's spelling or a former one."""
    if name in FIELDS:
        return {name: "image" if value == "picture" and name in IMAGE_IS_A_VALUE else value}
    if name in ALIASES:
        try:
            return ALIASES[name](value)
        except (ValueError, TypeError, LookupError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
            raise ConfigError(f"{name}={shown(value)} is not a value that {name} takes.") from None
    last = {known: known.rpartition(".")[2] for known in (*FIELDS, *ALIASES)}
    close = difflib.get_close_matches(name.rpartition(".")[2][:100], last.values(), n=1, cutoff=0.7)
    near = [repr(known) for known in last if last[known] in close]
    advice = f"Did you mean {' or '.join(near)}?" if near else "flowmo info --settings lists all."
    raise ConfigError(f"There is no setting {shown(name)}. {advice}")


def _boolean(value: Any) -> bool:
    return yaml.SafeLoader.bool_values[str(value).lower()]


def _whole_number(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:  # 1e3 is one too
        number = float(str(value))
        if not number.is_integer():
            raise
        return int(number)


def _finite_number(value: Any) -> float:
    number = float(str(value))
    if not math.isfinite(number):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # YAML reads JSON's 😀 as a pair


TYPES: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_boolean, "true or false"),
    int: (_whole_number, "a whole number"),
    float: (_finite_number, "a finite number"),
    str: (_text, "text"),
    Duration: (Duration, "a length in images, steps or epochs"),
}
"""How the value of a setting is read, from a value or its text, and the words for it."""


def convert(name: str, value: Any) -> Any:
    """Convert a value or its text to the setting's type without loss. No value is empty text if the default is.

    Raises:
        ConfigError: the value has another type.
    """
    default = FIELDS[name].default
    read, words = TYPES[type(default)]
    try:
        return "" if default == "" and value in NONE else read(value)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        example = repr(str(default)) if isinstance(default, str) else default
        message = f"{name}={shown(value)} does not work. Write {words}, for example {name}={example}."
        raise ConfigError(message) from None
