"""The Hugging Face Hub: a repository of ``model.safetensors``, its context model and a model card.

huggingface_hub does the transfers, so its settings apply: ``HF_HOME`` (cache), ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and
``HF_ENDPOINT``. Its ``PyTorchModelHubMixin`` is not used: it would make an optional package a dependency, and it knows
neither settings inside the file of weights nor context models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from flowmo.checkpoint import CheckpointError
from flowmo.errors import one_line

MODEL_FILE = "model.safetensors"
CONTEXT_FILE = "model.context.safetensors"
CARD_FILE = "README.md"
FILES = (MODEL_FILE, CONTEXT_FILE, CARD_FILE)
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
    with _hub(f"{name} is not a folder, and the Hub did not deliver it") as hub:
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
        CheckpointError: the Hub refuses, ``private`` is set but the repository is public, or huggingface_hub is not
            installed.
    """
    if not is_name(name) or "@" in name:
        raise CheckpointError(f"{name!r} is not a name of a repository. Write owner/name.")
    with _hub(f"The Hub did not accept {name}") as hub:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(name).private:  # it exists, and stays as it is
            raise CheckpointError(f"{name} exists and is public. Make it private on the Hub, or choose another name.")
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[*FILES], commit_message=message)
    return str(address)


METRICS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips_alex": "LPIPS (AlexNet)",
    "lpips_vgg": "LPIPS (VGG)",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "bits_per_pixel": "bits per pixel",
}
"""Keys of ``flowmo evaluate --json`` that a card shows, and their names."""
OF_INCEPTION = {"frechet_distance": "rFID", "kernel_distance": "rKID"}
"""Names of these metrics if they use features of FID's Inception."""


def card(tokenizer: Any, name: str, evaluation: Mapping[str, Any] | None = None) -> str:
    """Fill the Hub's model card template with what a tokenizer's settings tell.

    Args:
        name: ``owner/name`` of the repository.
        evaluation: output of ``flowmo evaluate --json``. It becomes the table and the ``model-index``.

    Raises:
        CheckpointError: ``evaluation`` has none of ``METRICS``.
    """
    config, m, opt = tokenizer.config, tokenizer.config.model, tokenizer.config.opt
    side, steps, native = config.data.image_size, config.eval.sampling.sample_steps, tokenizer.native_size
    title = name.partition("@")[0].rpartition("/")[2]
    ids = "continuous" if m.ids_per_token is None else f"{m.ids_per_token[0]} ids below {m.ids_per_token[1]} each"
    rates = ", ".join(f"{rate:.4f}" for rate in tokenizer.rates(side, side))
    model_index, results = "", "Not documented yet: results with their spread. `flowmo push --evaluation` adds them."
    if evaluation:
        values = {key: evaluation[key] for key in METRICS if isinstance(evaluation.get(key), int | float)}
        if not values:
            raise CheckpointError("The evaluation holds no metric. Use the output of flowmo evaluate --json.")
        count = evaluation.get("images", evaluation.get("pictures"))  # pictures: a former name
        names = METRICS | (OF_INCEPTION if evaluation.get("is_fid") else {})
        network = f" Features: {evaluation['feature_network']}." if evaluation.get("feature_network") else ""
        rows = [f"| {names[key]} | {value:.4g} |" for key, value in values.items()]
        about = f"{count} images, one sample each.{network}"
        results = "\n".join([about, "", "| metric | mean |", "|---|--:|", *rows])
        metrics = [{"type": key, "name": names[key], "value": value} for key, value in values.items()]
        task, dataset = {"type": "image-to-image"}, {"name": "held-out images", "type": "held-out"}
        result = {"task": task, "dataset": dataset, "metrics": metrics}
        model_index = yaml.safe_dump({"model-index": [{"name": title, "results": [result]}]}, sort_keys=False)
    return (
        (Path(__file__).parent / "card.md")
        .read_text(encoding="utf-8")
        .format(
            title=title,
            name=name,
            model_index=model_index,
            images="any height and width" if native else f"{side} × {side} pixels; larger ones as tiles",
            channels=m.channels,
            code=f"{'one token per 16 × 16 pixels' if native else f'{m.code_length} tokens'}, {ids}",
            rate=f"{rates} bits per pixel before entropy coding" if rates else "continuous",
            parameters=sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6,
            steps=f"{steps} step{'s' * (steps > 1)}",
            identity=tokenizer.identity(),
            weights=tokenizer.weights_identity(),
            training=f"Optimizer {opt.optimizer}, learning rate {opt.lr:g}, perceptual loss {opt.lpips_mode} × "
            f"{opt.lpips_weight:g}, bottleneck {m.quantization_type}.",
            evaluation=results,
        )
    )


def is_card_of(path: Path, tokenizer: Any, name: str = "") -> bool:
    """Return whether a card names a tokenizer's weights, in its table, and the repository, if one is given."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"| {tokenizer.weights_identity()} |" in text and name in text


@contextmanager
def _hub(failure: str) -> Iterator[Any]:
    """Import huggingface_hub, and turn its many errors into one."""
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{failure}: huggingface_hub is missing. Run: pip install 'flowmo[hub]'") from None
    try:
        yield huggingface_hub
    except CheckpointError:
        raise
    except Exception as error:  # its own errors, httpx's and the system's have no common base
        raise CheckpointError(f"{failure} ({one_line(error, 300)}).") from None
