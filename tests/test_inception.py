"""FID's feature network through torch-fidelity; with its true weights where those are at hand."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flowmo.evaluate.metrics.features import FeatureNetworkError
from flowmo.evaluate.metrics.inception import WEIGHTS, FIDInception
from flowmo.images import to_bytes
from flowmo.model.torchvision_import import import_torchvision

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("needs torch-fidelity", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The true network where FLOWMO_WEIGHTS has it; else its architecture with random weights and no classifier."""
    named = Path(os.environ.get("FLOWMO_WEIGHTS", ""))
    if any((named / name).is_file() for name in WEIGHTS[0]):
        return named
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    state = {}
    torch.manual_seed(0)
    loading = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: state
    try:
        module.FeatureExtractorInceptionV3.load_state_dict = lambda self, _: None
        state.update(module.FeatureExtractorInceptionV3("x", ["2048"]).state_dict())
    finally:
        module.load_state_dict_from_url = loading
        del module.FeatureExtractorInceptionV3.load_state_dict
    state["fc.weight"] = torch.zeros_like(state["fc.weight"])
    path = tmp_path_factory.mktemp("inception")
    torch.save(state, path / WEIGHTS[0][0])
    return path


def test_torchvision_imports_beside_any_torch():
    assert import_torchvision() is import_torchvision()
    assert hasattr(import_torchvision(), "transforms")


def test_features(folder):
    network = FIDInception(folder, download=False)
    images = torch.rand(3, 3, 40, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network(images)
    assert features.pooled.shape == (3, 2048)
    assert features.pooled.std() > 0
    assert features.logits is None, "these weights come without a classifier"
    assert features.spatial.shape == (3, 2023)
    assert features.spatial.std() > 0
    torch.testing.assert_close(network(images[1:2]).pooled, features.pooled[1:2], rtol=1e-3, atol=1e-4)
    # Pictures are seen as the 8-bit files that they would be.
    torch.testing.assert_close(network(images + 1e-4).pooled, features.pooled, rtol=0.2, atol=0.2)


@pytest.fixture
def images():
    return torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_default_protocol_equals_torch_fidelitys_own_forward(folder, images):
    network = FIDInception(folder, download=False)
    pooled, logits = network.network(to_bytes(images))
    network.has_classifier = True
    found = network(images)
    assert torch.equal(found.pooled, pooled)
    torch.testing.assert_close(found.logits, logits)


def test_spatial_features_are_in_adms_order(folder, images):
    """Row, column, channel, computed layer by layer and laid out with NumPy."""
    network = FIDInception(folder, download=False)
    found = network(images).spatial
    x = (interpolate_as_tensorflow(to_bytes(images)) - 128) / 128
    for name, layer in network.network.named_children():
        if name == "Mixed_6d":
            maps = layer.branch1x1(x).numpy()
            break
        x = layer(x)
    assert maps.shape == (2, 192, 17, 17)
    expected = np.stack([[m[channel, row, column] for row, column, channel in np.ndindex(17, 17, 7)] for m in maps])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-3 * expected.std())


def interpolate_as_tensorflow(x):
    """TensorFlow 1's bilinear resize: output pixel i lies at i · (size / 299), without a half-pixel offset."""
    x = x.numpy().astype(np.float64)
    for axis in (2, 3):
        size = x.shape[axis]
        place = np.arange(299) * (size / 299)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (place - low).reshape([-1, 1] if axis == 2 else [-1])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return torch.from_numpy(x).float()


def test_the_legacy_protocol_is_the_releases(folder, images):
    """Float images in [0, 1], half-pixel bilinear without antialiasing, then 2·x − 1: by NumPy, through the layers."""
    network = FIDInception(folder, download=False, protocol="legacy")
    default = FIDInception(folder, download=False)
    x = ((images.double() + 1) / 2).numpy()
    for axis in (2, 3):
        size = x.shape[axis]
        place = np.clip((np.arange(299) + 0.5) * size / 299 - 0.5, 0, None)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (place - low).reshape([-1, 1] if axis == 2 else [-1])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    seen = network._input(images)
    np.testing.assert_allclose(seen.numpy(), 2 * x - 1, atol=1e-5)
    assert "as the release" in network.name
    assert network.name != default.name
    assert not torch.equal(network(images).pooled, default(images).pooled)
    # Float images keep what 8 bits lose.
    assert not torch.equal(network(images + 1e-3).pooled, network(images).pooled)
    assert torch.equal(default(to_tensorlike(images) + 1e-3).pooled, default(to_tensorlike(images)).pooled)


def to_tensorlike(images):
    """Images of whole 8-bit values."""
    return to_bytes(images).float() / 127.5 - 1


def test_files_that_are_not_this_network(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in ({"fc.weight": torch.zeros(2)}, Trap()):
        torch.save(content, tmp_path / WEIGHTS[0][0])
        with pytest.raises(FeatureNetworkError, match="does not hold the weights of FID's Inception"):
            FIDInception(tmp_path, download=False)
    assert not (tmp_path / "ran").exists()
