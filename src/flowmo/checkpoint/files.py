"""Files of weights: the project's ``.safetensors`` (settings inside), training checkpoints, the authors' ``.pth``.

Nothing that is loaded can run code: ``.safetensors`` holds tensors only, and ``.pth`` is read with
``weights_only=True``. Whatever is written appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from flowmo.checkpoint import distributed as sharded
from flowmo.checkpoint import eight_bit, hub, pth
from flowmo.checkpoint import run_folder as runs
from flowmo.checkpoint.authors import CheckpointMismatchError, convert_release, is_release, release_config
from flowmo.config import PRESETS, Config, ConfigError
from flowmo.errors import FlowMoError
from flowmo.tokenizer import FlowMo

BUNDLED = Path(__file__).parent.parent / "pretrained"
FILE_NAME = hub.MODEL_FILE
FORMAT = "flowmo-1"
GENERATOR = "generator"
"""The stage of a training checkpoint that holds no tokenizer."""


class CheckpointError(FlowMoError, ValueError):
    """A file of weights that is missing, damaged, unsafe or of another architecture; the message is one line."""


def load(
    source: str | Path,
    *overrides: str,
    device: str | torch.device = "cpu",
    ema: bool = True,
) -> FlowMo:
    """A tokenizer with trained weights, ready for inference.

    Args:
        source: a bundled preset (``nano``), a ``.safetensors`` file, a folder that holds ``model.safetensors``, a
            training checkpoint (``.pth``, or the folder of a sharded one), a run's folder (``results/NAME``: its
            checkpoint judged best, or the newest), an authors' checkpoint (``.pth``), or the Hub id ``owner/name``, or
            ``owner/name@revision``, of a folder with ``model.safetensors``.
        overrides: ``section.name=value`` settings to change, for what an authors' file does not tell (its
            ``model.code_length``) or how it samples (``eval.sampling.sample_steps``).
        device: where the weights go; the CPU, as with torch itself, unless another is named. The command line's
            ``--device`` is a GPU where there is one.
        ema: of a training or authors' checkpoint, the averaged weights rather than the last ones.

    Raises:
        CheckpointError: no such file, or one that cannot be used; the message says why.
        ConfigError: an override that does not work.
    """
    path = find(source)
    config, state = read(path, overrides, ema)
    return build(config, state, path).to(device)


def find(source: str | Path) -> Path:
    """The file of weights that ``source`` names."""
    path = Path(source)
    if sharded.is_sharded(path):
        return path
    if path.is_dir():
        path = runs.chosen(path) or path / FILE_NAME
    if path.is_file():
        return path
    name = str(source)
    if name in PRESETS:
        bundled = BUNDLED / f"{name}.safetensors"
        if bundled.is_file():
            return bundled
        have = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.safetensors"))) or "none"
        raise CheckpointError(
            f"preset {name!r} comes without weights (bundled: {have}); load a file of its weights, or start from "
            f"random ones with flowmo.FlowMo(flowmo.preset({name!r}))"
        )
    if hub.is_name(name) and not path.suffix.startswith((".pt", ".safetensors")):
        try:
            return hub.fetch(name)
        except hub.HubError as error:
            raise CheckpointError(str(error)) from None
    raise CheckpointError(f"{source}: no such file, and no preset of that name ({', '.join(PRESETS)})")


def read(path: Path, overrides: tuple[str, ...] = (), ema: bool = True) -> tuple[Config, dict[str, Tensor]]:
    """Settings and weights of any accepted file, the weights under this project's names."""
    if path.suffix == ".safetensors":
        config, weights = read_safetensors(path)
        return config.override(*overrides), weights
    content = {} if path.is_dir() else read_pth(path)
    if path.is_dir() or "flowmo" in content:
        facts, state = read_shards(path, ema) if path.is_dir() else (content, content.get("ema" if ema else "model"))
        if facts.get("stage") == GENERATOR:
            raise CheckpointError(f"{path}: holds a generator, not a tokenizer; see flowmo generate")
        if not isinstance(facts.get("config"), dict) or not isinstance(state, dict):
            raise CheckpointError(f"{path}: a training checkpoint without its settings or weights")
        return Config.from_dict(facts["config"]).override(*overrides), state
    key = "model_ema_state_dict" if ema else "model_state_dict"
    state = content.get(key, content)
    if not isinstance(state, dict) or not is_release(state):
        raise CheckpointError(f"{path}: neither a training checkpoint of flowmo nor one of the authors' release")
    try:
        config = release_config(state).override(*overrides)
        return config, convert_release(state, config)
    except CheckpointMismatchError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_shards(path: Path, ema: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a sharded training checkpoint tells besides tensors, and its weights."""
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
        Config.from_dict(facts["config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a training checkpoint of flowmo ({error})") from None
    prefix = "ema." if ema else "model."
    tensors = {name: torch.empty(s) for name, s in sharded.shapes(path).items() if name.startswith(prefix)}
    sharded.read_into(path, tensors)
    return facts, {name.removeprefix(prefix): value for name, value in tensors.items()}


def read_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Settings of a file of weights; of a ``.safetensors`` file, without reading the weights."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as (config, _):
            return config.override(*overrides)
    return read(path, overrides)[0]


def read_safetensors(path: Path) -> tuple[Config, dict[str, Tensor]]:
    with open_safetensors(path) as (config, file):
        return config, eight_bit.expand({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


@contextmanager
def open_safetensors(path: Path) -> Iterator[tuple[Config, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not written by flowmo (its metadata has no format {FORMAT!r})")
            yield Config.from_dict(json.loads(metadata["config"])), file
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{path}: holds settings that do not work: {error}") from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({_short(error)})") from None


def read_pth(path: Path) -> dict[str, Any]:
    """See ``pth.read_pth``. Raises ``CheckpointError``."""
    try:
        return pth.read_pth(path)
    except pth.PthError as error:
        raise CheckpointError(str(error)) from None


def build(config: Config, state: Mapping[str, Tensor], name: str | Path = "checkpoint") -> FlowMo:
    """A tokenizer of ``config`` with the weights of ``state``, in float32 and evaluation mode.

    Raises:
        CheckpointError: keys or shapes are not those of ``config``'s architecture.
    """
    tokenizer = on_meta(lambda: FlowMo(config), config.model.dec_depth + config.model.enc_depth, state, name)
    wanted = tokenizer.state_dict()
    wrong = [
        *(f"{key} is missing" for key in wanted if key not in state),
        *(f"{key} is unexpected" for key in state if key not in wanted),
        *(
            f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ),
    ]
    if wrong:
        raise CheckpointError(f"{name}: weights of another architecture: {'; '.join(wrong[:3])} ({len(wrong)} such)")
    tokenizer.load_state_dict(finite(state, name), assign=True)
    return tokenizer.eval().requires_grad_(False)


Network = TypeVar("Network", bound=nn.Module)


def on_meta(build: Callable[[], Network], blocks: int, state: Mapping[str, Tensor], name: str | Path) -> Network:
    """A network without memory for its weights, whose settings come from the same file as ``state``.

    Raises:
        CheckpointError: the settings ask for more than there are weights of, or for what cannot be built.
    """
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise CheckpointError(f"{name}: holds something other than named tensors among its weights")
    if blocks > len(state):  # each block has several; a billion of them would be built for long
        raise CheckpointError(f"{name}: weights of another architecture: {blocks} blocks of {len(state)} tensors")
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, OverflowError, TypeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{name}: holds settings that do not work: {_short(error)}") from None


def finite(state: Mapping[str, Tensor], name: str | Path) -> dict[str, Tensor]:
    """Weights in float32.

    Raises:
        CheckpointError: one is not finite, or no real number.
    """
    wrong = next((key for key, value in state.items() if value.is_complex()), None)
    if wrong is not None:
        raise CheckpointError(f"{name}: {wrong} holds complex numbers")
    state = {key: value.float() for key, value in state.items()}
    bad = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{name}: {bad[0]} holds NaN or infinite values ({len(bad)} such)")
    return state


def _short(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def save(tokenizer: FlowMo, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and settings as one ``.safetensors`` file.

    Args:
        dtype: on disk. float16 halves the file, at about 3 decimal digits; int8 quarters it, see ``eight_bit``.

    Raises:
        CheckpointError: ``path`` has another suffix, by which ``load`` would take it for another kind of file.
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: weights are saved as .safetensors; write {Path(path).with_suffix('.safetensors')}"
        )
    state = eight_bit.stored(tokenizer.state_dict(), dtype)
    # Machine paths of the training run are nobody else's business, and would make equal models unequal files.
    paths = (
        "model.language_model",
        "data.train",
        "data.train_index",
        "data.val",
        "data.val_index",
        "opt.perceptual_weights",
        "opt.teacher",
        "generator.tokenizer",
    )
    config = tokenizer.config.override(*(f"{name}=" for name in paths))
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict())}
    write_whole(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def write_whole(path: str | Path, write: Callable[[str], object]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, then put it in place in one step, on disk for good."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        with open(temporary, "rb") as file:  # or a power cut could leave the name with an empty file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_content(path: str | Path, content: str | bytes) -> None:
    """A text, in UTF-8, or bytes, as ``write_whole`` writes."""
    data = content.encode() if isinstance(content, str) else content
    write_whole(path, lambda temporary: Path(temporary).write_bytes(data))


def flush_folder(folder: Path) -> None:
    """Have the names in a folder written to disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
