"""The Hugging Face Hub: a repository of ``model.safetensors``, its context model and a model card.

huggingface_hub does the transfers, so its settings apply: ``HF_HOME`` (cache), ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and
``HF_ENDPOINT``. Its ``PyTorchModelHubMixin`` is not used: it would make an optional package a dependency, and it knows
neither settings inside the file of weights nor context models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowmo.checkpoint import CheckpointError

MODEL_FILE = "model.safetensors"
CONTEXT_FILE = "model.context.safetensors"
CARD_FILE = "README.md"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w][\w./-]{0,95})?", re.ASCII)


def is_name(text: str) -> bool:
    """True for ``owner/name`` and ``owner/name@revision``, False for paths."""
    return NAME.fullmatch(text) is not None and ".." not in text


def fetch(name: str) -> Path:
    """Download or find in the cache ``model.safetensors`` of a repository, with its context model beside it.

    Raises:
        CheckpointError: no such repository, no connection, or huggingface_hub is not installed.
    """
    repository, _, revision = name.partition("@")
    with _hub(
        f"{name} is not a folder, and fetching it from the Hub",
        f"{name} is not a folder, and the Hub did not deliver it",
    ) as hub:
        files = [MODEL_FILE, CONTEXT_FILE]
        folder = Path(hub.snapshot_download(repository, revision=revision or None, allow_patterns=files))
    if not (folder / MODEL_FILE).is_file():
        raise CheckpointError(f"{name}: the repository has no {MODEL_FILE}.")
    return folder / MODEL_FILE


def push(folder: Path, name: str, private: bool = False, message: str = "Upload a FlowMo tokenizer") -> str:
    """Upload a folder of ``FlowMo.save_pretrained`` to a repository, which is created if missing.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the Hub refuses, or huggingface_hub is not installed.
    """
    if not is_name(name) or "@" in name:
        raise CheckpointError(f"{name!r} is no name of a repository. Write owner/name.")
    with _hub(f"Uploading {name} to the Hub", f"The Hub did not accept {name}") as hub:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        files = [MODEL_FILE, CONTEXT_FILE, CARD_FILE]
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message=message)
    return str(address)


def card(tokenizer: Any, name: str) -> str:
    """A model card with everything that a tokenizer's settings tell."""
    config, m = tokenizer.config, tokenizer.config.model
    buffers = dict(tokenizer.named_buffers())  # packed weights are in the state, but are not parameters
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
| images | {config.data.image_size} × {config.data.image_size} |
| code | {m.code_length} tokens of {m.context_dim} channels, bottleneck {m.quantization_type}, {rate} |
| parameters | {parameters:.1f} M |
| decodes in | {config.eval.sampling.sample_steps} steps |
| identity | {tokenizer.identity()} |

```python
import flowmo

tok = flowmo.load("{name}")
codes = tok.encode_image(image)
image = tok.decode_image(codes)
```

Not documented yet: training data and its licence, results with their spread, failures.
"""


@contextmanager
def _hub(purpose: str, failure: str) -> Iterator[Any]:
    """Import huggingface_hub, and turn its many errors into one."""
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{purpose} needs huggingface_hub. Run: pip install 'flowmo[hub]'") from None
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield huggingface_hub
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(f"{failure} ({lines[0][:300] if lines else type(error).__name__}).") from None
