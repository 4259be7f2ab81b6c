"""Files of weights: our ``.safetensors`` (settings inside), training checkpoints, the authors' ``.pth``.

Readers return settings and tensors; the caller builds the model. Reading cannot run code: ``.safetensors`` holds
tensors only, and ``.pth`` is read with ``weights_only=True``. Files are written atomically.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from flowmo.checkpoint import CheckpointError, eight_bit, hub, reading_error, run_folder
from flowmo.checkpoint.authors import convert_release, is_release, release_config
from flowmo.checkpoint.pth import read_pth
from flowmo.config import PRESETS, Config, ConfigError
from flowmo.errors import one_line

BUNDLED = Path(__file__).parent.parent / "pretrained"
FORMAT, GENERATOR_FORMAT = FORMATS = ("flowmo-1", "flowmo-generator-1")
ALIGNMENT = 64
"""PyTorch aligns CPU tensors to this many bytes."""
PATH_SETTINGS = (
    "model.language_model",
    "data.train",
    "data.train_index",
    "data.val",
    "data.val_index",
    "opt.perceptual_weights",
    "opt.teacher",
    "generator.tokenizer",
)
"""Settings that name paths of the training machine. Files of weights leave them out."""


def find(source: str | Path) -> Path:
    """Find the file of weights that ``source`` names; see ``flowmo.load``.

    Raises:
        CheckpointError: there is none.
    """
    name, path = str(source), Path(source)
    with suppress(OSError):  # a name that no file can have
        if isinstance(source, str) and source in PRESETS and (BUNDLED / f"{source}.safetensors").is_file():
            return BUNDLED / f"{source}.safetensors"  # even if a run here has the same name
        if path.is_dir() and not run_folder.is_sharded(path):
            path = run_folder.best_checkpoint(path) or path / hub.MODEL_FILE
        if name in PRESETS and not (path.is_file() or run_folder.is_sharded(path)):
            path = BUNDLED / f"{name}.safetensors"
        elif hub.is_name(name) and not Path(source).exists() and not path.suffix.startswith((".pt", ".safetensors")):
            path = hub.fetch(name)
        if path.is_file() or run_folder.is_sharded(path):
            return path
    bundled = ", ".join(preset for preset in PRESETS if (BUNDLED / f"{preset}.safetensors").is_file())
    raise CheckpointError(
        f"{source}: No weights found under this name. Name a file of weights, a folder with {hub.MODEL_FILE} or with "
        f"checkpoints of a run, or a preset that comes with weights ({bundled}). For random weights use "
        "flowmo.FlowMo(flowmo.preset(NAME))."
    )


def read(path: Path, overrides: tuple[str, ...] = (), ema: bool = True) -> tuple[Config, dict[str, Tensor]]:
    """Read settings and weights of a tokenizer from any accepted file, the weights under our names.

    Args:
        ema: of a training or authors' checkpoint, the EMA weights rather than the last ones.

    Raises:
        CheckpointError: the file cannot be used.
        ConfigError: an override changes the architecture that the file records, or a fixed image size.
    """
    metadata, state = read_content(path, ema)
    if not is_release(state):
        return _override(_tokenizer_config(path, metadata), overrides, path), state
    try:
        config = release_config(state).override(*overrides)
        return config, convert_release(state, config)
    except ConfigError:
        raise
    except (ValueError, AttributeError, IndexError, TypeError) as error:  # odd names, not tensors, not of two axes
        raise CheckpointError(f"{path}: {one_line(error, 500)}") from None


def read_content(path: Path, ema: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and weights of a tokenizer, a generator or an authors' file.

    The metadata holds ``config``, and for a generator ``vocabulary``. An authors' file has none.

    Raises:
        CheckpointError: the file cannot be used.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.is_dir():
        from flowmo.checkpoint import distributed as sharded  # takes as long to import as half of PyTorch

        return read_raw_metadata(path), sharded.read(path, "ema." if ema else "model.")
    content = read_pth(path)
    if "flowmo" in content:
        state = content.get("ema" if ema else "model")
        if not isinstance(content.get("config"), dict) or not isinstance(state, dict):
            raise CheckpointError(f"{path} is a training checkpoint without its settings or weights.")
        return content, state
    state = content.get("model_ema_state_dict" if ema else "model_state_dict", content)
    if not isinstance(state, dict) or not is_release(state):
        raise CheckpointError(f"{path} is neither a training checkpoint of flowmo nor one of the authors' release.")
    return {}, state


def read_raw_metadata(path: Path) -> dict[str, Any]:
    """Read a file's metadata. ``flowmo`` (format version) exists only in our training checkpoints."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path, weights=False)[0]
    if not path.is_dir():
        return read_pth(path)
    try:
        metadata = json.loads((path / run_folder.METADATA).read_text(encoding="utf-8"))
        if isinstance(metadata, dict):
            return metadata
        raise ValueError("its metadata is not a table")
    except (OSError, ValueError, RecursionError) as error:
        raise reading_error(path, error, "damaged or not a training checkpoint of flowmo") from None


def read_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a tokenizer's settings. The authors' files store none; they are inferred from tensor shapes.

    Raises:
        CheckpointError, ConfigError: as ``read``.
    """
    metadata = read_raw_metadata(path)
    if path.suffix == ".safetensors" or "flowmo" in metadata:
        return _override(_tokenizer_config(path, metadata), overrides, path)
    return read(path, overrides)[0]


def _override(own: Config, overrides: tuple[str, ...], path: Path) -> Config:
    """Change settings that the weights of ``path`` leave open."""
    config = own.override(*overrides)
    trained, asked = own.architecture(), config.architecture()
    wrong = [f"model.{name}={trained.get(name)}" for name in trained | asked if trained.get(name) != asked.get(name)]
    if own.model.network != "windowed" and own.data.image_size != config.data.image_size:
        wrong.append(f"data.image_size={own.data.image_size}")
    if wrong:
        raise ConfigError(f"{path}: its weights were trained with {', '.join(wrong)}, which cannot be changed.")
    return config


def _tokenizer_config(path: Path, metadata: Mapping[str, Any]) -> Config:
    if "vocabulary" in metadata:
        raise CheckpointError(f"{path} holds a generator, not a tokenizer. Use it with flowmo generate.")
    if "config" not in metadata:
        raise CheckpointError(f"{path} holds no settings. Load another file of this model.")
    try:
        return Config.from_dict(metadata["config"])
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{path} holds settings that do not work: {error}") from None


def _read_safetensors(path: Path, weights: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in FORMATS:
                raise CheckpointError(f"{path} was not written by flowmo: its metadata has no format {FORMAT!r}.")
            tensors = {key: file.get_tensor(key) for key in file.keys()} if weights else {}  # noqa: SIM118
        parsed = {key: json.loads(metadata[key]) for key in ("config", "vocabulary") if key in metadata}
        return parsed, eight_bit.expand(tensors)
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise reading_error(path, error, "damaged or not a safetensors file") from None


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it if it does not begin where PyTorch would put it.

    The last bit of a matrix product can depend on the alignment of its operands (seen with AVX2). A mapped file begins
    its tensors at any multiple of 8 bytes.
    """
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


Network = TypeVar("Network", bound=nn.Module)


def instantiate(build: Callable[[], Network], blocks: int, state: Mapping[str, Tensor], name: str | Path) -> Network:
    """Build a network on the meta device and load ``state``, in float32 and evaluation mode.

    Args:
        blocks: number of blocks that the file's settings ask for.
        name: of the file, for messages.

    Raises:
        CheckpointError: the settings do not work or ask for other weights, or a weight is not a finite real number.
    """
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.is_complex():
            raise CheckpointError(f"{name} holds something other than named tensors of real numbers: {one_line(key)}.")
    if blocks > len(state):  # a billion blocks would take long to build, even on meta
        raise CheckpointError(f"{name} holds weights of another architecture: {blocks} blocks of {len(state)} tensors.")
    try:
        with torch.device("meta"):
            network = build()
    except (RuntimeError, OverflowError, TypeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{name} holds settings that do not work: {one_line(error, 200)}") from None
    weights = {key: aligned(value.float()) for key, value in state.items()}
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{name} holds weights of another architecture: {one_line(error, 200)}") from None
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{name}: {bad[0]} holds NaN or infinite values ({len(bad)} such).")
    return network.eval()


def write_safetensors(
    path: str | Path, config: Config, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, **metadata: str
) -> None:
    """Write weights, settings and other metadata as one ``.safetensors`` file; see ``flowmo.save``."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: Weights are saved as .safetensors. Write {path.with_suffix('.safetensors')}.")
    config = config.override(*(f"{name}=" for name in PATH_SETTINGS))
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), **metadata}
    tensors = eight_bit.stored(state, dtype)
    write_whole(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def write_whole(path: str | Path, write: Callable[[str], object]) -> None:
    """Write a file atomically and durably: ``write`` fills a temporary file beside ``path``, which replaces it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
    # files of tempfile and safetensors lack the permissions of any new file
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = os.fstat(descriptor).st_mode
    os.close(descriptor)
    try:
        write(temporary)
        wanted = (path.stat().st_mode if path.is_file() else mode) & 0o777
        if os.stat(temporary).st_mode & 0o777 != wanted:
            with suppress(OSError):  # some file systems have no permissions
                os.chmod(temporary, wanted)
        with open(temporary, "rb") as file:  # fsync, else a power cut can leave it empty
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_content(path: str | Path, content: str | bytes) -> None:
    """``write_whole`` for bytes, or text in UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    write_whole(path, lambda temporary: Path(temporary).write_bytes(data))


def flush_folder(folder: Path) -> None:
    """Flush a folder's names to disk, on POSIX systems."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
