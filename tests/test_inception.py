"""FID's feature network through torch-fidelity; with its true weights where those are at hand."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from flowmo.evaluate.features import FeatureNetworkError
from flowmo.evaluate.inception import WEIGHTS, FIDInception
from flowmo.torchvision_import import import_torchvision

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
    assert features.pooled.shape == (3, network.channels)
    assert features.pooled.std() > 0
    assert features.logits is None, "these weights come without a classifier"
    assert features.spatial.shape == (3, 2023)
    assert features.spatial.std() > 0
    torch.testing.assert_close(network(images[1:2]).pooled, features.pooled[1:2], rtol=1e-3, atol=1e-4)
    # Pictures are seen as the 8-bit files that they would be.
    torch.testing.assert_close(network(images + 1e-4).pooled, features.pooled, rtol=0.2, atol=0.2)


def test_files_that_are_not_this_network(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in ({"fc.weight": torch.zeros(2)}, Trap()):
        torch.save(content, tmp_path / WEIGHTS[0][0])
        with pytest.raises(FeatureNetworkError, match="not the weights of FID's Inception"):
            FIDInception(tmp_path, download=False)
    assert not (tmp_path / "ran").exists()
