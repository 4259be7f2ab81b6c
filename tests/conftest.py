"""Small real models and real pictures that many tests share."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Page
from PIL import Image

from flowmo import Config, FlowMo, save
from flowmo.cli import main
from flowmo.config import ModelConfig
from flowmo.evaluate.metrics import inception
from flowmo.evaluate.reconstruction import Evaluators
from flowmo.losses.perceptual import ResNetLogits
from flowmo.model.quantizers import Quantizer, build_quantizer
from flowmo.model.torchvision_import import before_importing
from flowmo.train.trainer import Trainer
from flowmo.web.export import ExportError, npm_package

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
WEIGHTS = Path(os.environ.get("FLOWMO_WEIGHTS") or SHARED / "weights")
PICTURES = ROOT / "examples" / "pictures"
CASES = ROOT / "tests" / "cases"
"""Small inputs that people's files look like; ``expected.json`` says what is right."""

CLASSES = ("n01440764", "n02102040", "n03888257")
"""Tench, English springer and parachute."""

TINY = {
    "data": {"image_size": 32},
    "model": {
        "patch_size": 8,
        "hidden_size": 64,
        "num_heads": 2,
        "dec_depth": 3,
        "enc_hidden_size": 32,
        "enc_num_heads": 1,
        "enc_depth": 2,
        "code_length": 6,
        "context_dim": 8,
        "codebook_size_for_entropy": 4,
    },
}

TINY_NATIVE = {
    "data": {"image_size": 64},
    "model": {
        "network": "windowed",
        "patch_size": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "dec_depth": 2,
        "enc_hidden_size": 32,
        "enc_num_heads": 2,
        "enc_depth": 2,
        "conv_depth": 1,
        "window": 4,
        "code_length": 16,
        "context_dim": 12,
        "quantization_type": "fsq",
        "prediction": "image",
        "nested_dropout": 1.0,
        "enable_cfg": False,
    },
    "opt": {"lpips_weight": 0.0, "mup_base_width": 0},
    "eval": {"sampling": {"sample_steps": 1, "guidance": 1.0}},
}


def open_gates(tokenizer: FlowMo) -> FlowMo:
    """A fresh decoder's gates are closed, which would hide most of it from a test; give them small random values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if "modulation" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tokenizer


def run_command(capsys, *words) -> tuple[int, str, str]:
    """``flowmo`` with these words: its exit code, and what it printed on the two outputs."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def write_language_model(path: Path, **shape: int) -> None:
    """A Qwen2 of random weights, saved as any other causal language model is; skips where transformers is missing."""
    before_importing("transformers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=40, **shape)
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)


LONGEST = ("test_docs.py", "test_distributed.py", "test_page.py", "test_reproduce.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start files with long tests first, or one worker would end with them alone."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def bottleneck(kind: str, channels: int, **settings: Any) -> Quantizer:
    return build_quantizer(ModelConfig(quantization_type=kind, context_dim=channels, **settings))


def lfq(
    channels: int, group: int, entropy_weight: float = 0.0025, commitment_weight: float = 0.000625, kind: str = "lfq"
) -> Quantizer:
    weights = {"entropy_loss_weight": entropy_weight, "commit_loss_weight": commitment_weight}
    return bottleneck(kind, channels, codebook_size_for_entropy=group, **weights)


def bsq(channels: int, group: int, entropy_weight: float = 0.0025) -> Quantizer:
    return lfq(channels, group, entropy_weight, kind="bsq")


def fsq(channels: int, levels: int, group_bits: int) -> Quantizer:
    return bottleneck("fsq", channels, fsq_levels=levels, codebook_size_for_entropy=group_bits)


def vq(channels: int, entries: int, sub_tokens: int, decay: float = 0.99, commitment_weight: float = 0.25) -> Quantizer:
    settings = {"vq_entries": entries, "vq_sub_tokens": sub_tokens, "vq_decay": decay}
    return bottleneck("vq", channels, vq_commit_weight=commitment_weight, **settings)


@pytest.fixture
def plots() -> None:
    """Let training draw its curves; a test asks for this where it looks at them."""


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch) -> None:
    """Training draws nothing otherwise, because Matplotlib takes longer than a tiny run."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("flowmo.train.trainer.draw", lambda *_: None)


STAND_INS = {
    (Trainer, "_utilisation"): lambda run, rate: 0.0,
    (Trainer, "_max_microbatch"): lambda run: 1_000_000,
}
FORECASTS = {(owner, name): getattr(owner, name) for owner, name in STAND_INS}


def forecast_nothing() -> None:
    """Let runs take every batch to fit, and leave out how busy they keep the device."""
    for (owner, name), stand_in in STAND_INS.items():
        setattr(owner, name, stand_in)


@pytest.fixture(scope="session", autouse=True)
def no_forecasts() -> None:
    """Runs do not forecast their cost, because that takes longer than training a tiny model."""
    forecast_nothing()


@pytest.fixture
def forecasts(monkeypatch) -> None:
    """Let runs forecast their cost; a test asks for this where it looks at the forecast."""
    for (owner, name), forecast in FORECASTS.items():
        monkeypatch.setattr(owner, name, forecast)


@pytest.fixture
def compile_by(monkeypatch) -> Iterator[Callable[[Any], None]]:
    """Set the backend of ``Module.compile``, which is otherwise Inductor and takes a minute of g++."""
    compile_module = torch.nn.Module.compile

    def use(backend):
        torch._dynamo.reset()
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend))

    yield use
    torch._dynamo.reset()


@pytest.fixture
def tiny_config() -> Config:
    return Config.from_dict(TINY)


@pytest.fixture
def tiny(tiny_config) -> FlowMo:
    torch.manual_seed(0)
    return open_gates(FlowMo(tiny_config)).eval().requires_grad_(False)


@pytest.fixture
def native() -> FlowMo:
    """A tokenizer of native size and variable rate: four planes of 9 bits."""
    torch.manual_seed(0)
    return FlowMo(Config.from_dict(TINY_NATIVE)).eval().requires_grad_(False)


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of several workers makes, and that no test may change."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            make(root / f"{name}.partial")
            (root / f"{name}.partial").rename(root / name)
    return root / name


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("downloads"))
    yield page
    page.browser.quit()


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> Path:
    """The unpacked npm package; FLOWMO_ONNXRUNTIME_WEB names a copy."""
    if named := os.environ.get("FLOWMO_ONNXRUNTIME_WEB"):
        return Path(named)
    try:
        return npm_package(tmp_path_factory.mktemp("runtime"))
    except ExportError as error:
        pytest.skip(str(error))


@pytest.fixture
def images() -> torch.Tensor:
    """Five noise pictures b 3 32 32 in [−1, 1]."""
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture
def picture_files() -> list[Path]:
    files = sorted(PICTURES.glob("*.jpg"))
    assert len(files) >= 4
    return files


@pytest.fixture
def picture(picture_files) -> Image.Image:
    return Image.open(picture_files[0]).convert("RGB")


@pytest.fixture
def photo(tmp_path, picture) -> Path:
    """A photograph of 70 × 50 pixels as a file."""
    path = tmp_path / "photo.jpg"
    picture.resize((70, 50)).save(path)
    return path


@pytest.fixture
def png(tmp_path, picture) -> Path:
    """The same without loss: browsers decode JPEG in their own ways."""
    path = tmp_path / "photo.png"
    picture.resize((70, 50)).save(path)
    return path


@pytest.fixture
def trained_weights() -> Path:
    """The folder of trained perceptual networks; a test that needs it is skipped without."""
    if not (WEIGHTS / "lpips_alex_heads.pth").is_file():
        pytest.skip("needs trained networks: name their folder by FLOWMO_WEIGHTS")
    return WEIGHTS


@pytest.fixture
def small_features(monkeypatch) -> None:
    """ResNet-50 and Inception see a tenth of their pixels, because they take most of the time of a study this small."""
    monkeypatch.setattr(ResNetLogits, "SIDE", 64)
    monkeypatch.setattr(inception, "SIDE", 96)


@pytest.fixture
def evaluators(trained_weights, monkeypatch) -> Evaluators:
    """Only the quickest of the evaluators of studies."""
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(trained_weights))
    found, _ = Evaluators.find(("alex",), "none")
    found.cache_originals = True
    return found


@pytest.fixture
def class_folder(tmp_path, picture_files):
    """Photographs in folders named by their class, two a class."""
    folder = tmp_path / "classes"
    for i, file in enumerate(picture_files[:6]):
        (folder / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / CLASSES[i % 3])
    return folder


@pytest.fixture
def tiny_model(tiny_config, tmp_path) -> Path:
    """A tokenizer of random weights, as a file."""
    torch.manual_seed(0)
    save(open_gates(FlowMo(tiny_config)).eval(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def release_shapes(config) -> dict[str, list[int]]:
    """Keys and shapes of an authors' model with these settings, from those of their ``flowmo_lo``."""
    m, shapes = config.model, {}
    pixels = {48: 3 * m.patch_size**2}
    sizes = {
        "encoder": {**{k * 768: k * m.enc_hidden_size for k in range(1, 7)}, **pixels, 18: m.context_dim}
        | {64: m.enc_hidden_size // m.enc_num_heads},
        "decoder": {**{k * 1152: k * m.hidden_size for k in range(1, 7)}, **pixels, 19: m.context_dim + 1}
        | {96: m.hidden_size // m.num_heads},
    }
    for key, shape in json.loads((ROOT / "tests" / "golden" / "state_dict_lo.json").read_text()).items():
        network = key.partition(".")[0]
        scaled = [sizes[network].get(size, size) for size in shape]
        if ".double_blocks." not in key:
            shapes[key] = scaled
        elif ".double_blocks.0." in key:
            depth = m.enc_depth if network == "encoder" else m.dec_depth
            shapes |= {key.replace("blocks.0.", f"blocks.{block}."): scaled for block in range(depth)}
    return shapes
