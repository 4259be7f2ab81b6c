"""The Hugging Face Hub: a tokenizer as a repository of ``model.safetensors``, its context model and a card.

huggingface_hub does the talking, and so its settings hold: the cache (``HF_HOME``), offline work (``HF_HUB_OFFLINE``),
the token (``HF_TOKEN``), another server (``HF_ENDPOINT``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmo.errors import FlowMoError

MODEL_FILE = "model.safetensors"
CONTEXT_FILE = "model.context.safetensors"
CARD_FILE = "README.md"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w][\w./-]{0,95})?", re.ASCII)


class HubError(FlowMoError, OSError):
    """A repository that cannot be had or written; the message is one line."""


def is_name(text: str) -> bool:
    """Whether something looks like ``owner/name``, or ``owner/name@revision``, and like no path."""
    return NAME.fullmatch(text) is not None and ".." not in text


def fetch(name: str) -> Path:
    """``model.safetensors`` of a repository, with its context model beside it; from the cache where that has them.

    Raises:
        HubError: no such repository, no way to it, or huggingface_hub is not installed.
    """
    hub = _library(f"{name}: no such folder here, and fetching it from the Hub")
    repository, _, revision = name.partition("@")
    with _one_line(f"{name}: no such folder here, and not to be had from the Hub"):
        files = [MODEL_FILE, CONTEXT_FILE]
        folder = Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=files))
    if not (folder / MODEL_FILE).is_file():
        raise HubError(f"{name}: that repository holds no {MODEL_FILE}")
    return folder / MODEL_FILE


def push(folder: Path, name: str, private: bool = False, message: str = "Upload a FlowMo tokenizer") -> str:
    """Upload the files of a folder that ``write_folder`` filled; the repository is made where there is none.

    Returns:
        The address of the repository.

    Raises:
        HubError: the Hub refuses, or huggingface_hub is not installed.
    """
    if not is_name(name) or "@" in name:
        raise HubError(f"{name!r} is no name of a repository; write owner/name")
    hub = _library(f"{name}: uploading to the Hub")
    with _one_line(f"{name}: the Hub did not take it"):
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        files = [MODEL_FILE, CONTEXT_FILE, CARD_FILE]
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message=message)
    return str(address)


def write_folder(tokenizer: Any, folder: Path, context: bytes | None = None, name: str = "owner/name") -> None:
    """A tokenizer as a folder in the Hub's layout, which ``flowmo.load`` takes too."""
    from flowmo.checkpoint.files import save, write_content

    save(tokenizer, folder / MODEL_FILE)
    write_content(folder / CARD_FILE, card(tokenizer, name))
    if context is not None:
        write_content(folder / CONTEXT_FILE, context)


def card(tokenizer: Any, name: str) -> str:
    """A model card: what can be told of a tokenizer by its settings, and room for what cannot."""
    config, m = tokenizer.config, tokenizer.config.model
    buffers = dict(tokenizer.named_buffers())  # packed weights are no parameters, but in the state all the same
    parameters = sum(v.numel() for name, v in tokenizer.state_dict().items() if name not in buffers) / 1e6
    rate = "continuous" if config.bits_per_pixel is None else f"{config.bits_per_pixel:.4f} bits per pixel"
    return f"""---
library_name: flowmo
tags: [flowmo, image-tokenizer, image-compression]
---
# {name.partition("@")[0].rpartition("/")[2]}

A FlowMo image tokenizer (*Flow to the Mode*, [arXiv 2503.11056](https://arxiv.org/abs/2503.11056)).

| | |
|---|---|
| pictures | {config.data.image_size} × {config.data.image_size} |
| code | {m.code_length} tokens of {m.context_dim} channels, bottleneck {m.quantization_type}, {rate} |
| parameters | {parameters:.1f} M |
| decodes in | {config.eval.sampling.sample_steps} steps |
| identity | {tokenizer.identity()} |

```python
import flowmo

tok = flowmo.load("{name}")
codes = tok.encode_image(picture)
picture = tok.decode_image(codes)
```

Training data, its licence, results with their spread, and failures: not told yet.
"""


def _library(purpose: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise HubError(f"{purpose} needs huggingface_hub: pip install 'flowmo[hub]'") from None
    return huggingface_hub


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """The library's many errors as one of ours."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise HubError(f"{what} ({lines[0][:300] if lines else type(error).__name__})") from None
