import pytest
import torch
from conftest import SHARED

from flowmo.evaluate.metrics.features import ResNetFeatures
from flowmo.images import read_image, to_tensor
from flowmo.losses.perceptual import LPIPS, RESNET, ResNetLogits, WeightsNotFoundError, build_distance, find_weights
from flowmo.losses.resnet import ResNet50
from flowmo.model.torchvision_import import TorchvisionError, import_torchvision

EVALUATION = SHARED / "data" / "eval_256"


@pytest.fixture(params=["alex", "vgg"])
def distance(request, trained_weights):
    return LPIPS(request.param, trained_weights, download=False)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 64, 80, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def test_distance_of_equals_is_zero_and_grows(distance, pair):
    x, y = pair
    assert distance(x, x).abs().max() < 1e-6
    near = distance(x, x + 0.1 * (y - x))
    far = distance(x, y)
    assert far.shape == (2,)
    assert (far > near).all()
    assert (near > 0).all()


def test_batch_does_not_matter(distance, pair):
    x, y = pair
    torch.testing.assert_close(distance(x, y)[1:], distance(x[1:], y[1:]), atol=1e-5, rtol=1e-4)


def test_gradient_reaches_the_picture_and_nothing_else(distance, pair):
    x, y = pair
    y = y.requires_grad_()
    distance(x, y).sum().backward()
    assert y.grad.isfinite().all()
    assert y.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in distance.parameters())


def test_gradient_is_finite_where_features_are_all_zero(distance):
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    distance(torch.zeros(1, 3, 64, 64), flat).sum().backward()
    assert flat.grad.isfinite().all()


def torchvision_or_skip():
    try:
        return import_torchvision()
    except TorchvisionError as error:
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_equals_the_lpips_package(trained_weights, pair, monkeypatch):
    """The published implementation on the same weights."""
    torchvision_or_skip()
    lpips = pytest.importorskip("lpips")
    for net in ("alex", "vgg"):
        ours = LPIPS(net, trained_weights, download=False)
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        state = {}
        for name, value in ours.network.state_dict().items():
            row = sum(index < int(name.partition(".")[0]) for index in ours.maps)
            state[f"net.slice{row + 1}.{name}"] = value
        missing = theirs.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        expected = theirs(*pair).flatten()
        assert (ours(*pair) - expected).abs().max() < 1e-5


# ResNet logits


@pytest.fixture
def resnet(trained_weights):
    if not any((trained_weights / name).is_file() for name in RESNET[0]):
        pytest.skip(f"needs a trained ResNet-50: {' or '.join(RESNET[0])} in the folder named by FLOWMO_WEIGHTS")
    return ResNetLogits(trained_weights, download=False)


@pytest.mark.skipif(not EVALUATION.is_dir(), reason="needs photographs of known classes (../shared/data/eval_256)")
def test_resnet_knows_what_it_sees(resnet):
    """Photographs whose file names start with their ImageNet class."""
    files = sorted(EVALUATION.glob("*.jpg"))[::25]
    images = torch.stack([to_tensor(read_image(file)) for file in files])
    with torch.no_grad():
        found = resnet.logits(images).argmax(dim=1)
    right = sum(int(file.name.split("_")[0]) == int(label) for file, label in zip(files, found, strict=True))
    assert right >= 0.8 * len(files)
    assert "resnet50" in resnet.name


def test_resnet_distance(resnet, pair):
    x, y = pair
    assert resnet(x, x).abs().max() == 0
    assert resnet(x, y).shape == (2,)
    torch.testing.assert_close(resnet(x, y), (resnet.logits(x) - resnet.logits(y)).square().mean(dim=1))
    y = y.requires_grad_()
    resnet(x, y).sum().backward()
    assert y.grad.isfinite().all()
    assert y.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in resnet.parameters())


def test_resnet_equals_torchvisions(pair):
    """The same random weights in both; torchvision's own are found by its name for them."""
    torchvision = torchvision_or_skip()
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = ResNet50().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url == RESNET[1]


def test_distances_by_the_name_of_the_setting(trained_weights, resnet):
    assert [build_distance(mode, trained_weights).name for mode in ("vgg", "alex")] == ["LPIPS (vgg)", "LPIPS (alex)"]
    assert build_distance("resnet", trained_weights).name == resnet.name


def test_mean_of_both_networks(trained_weights, pair):
    vgg, alex, both = (build_distance(mode, trained_weights) for mode in ("vgg", "alex", "vgg+alex"))
    x, y = pair
    torch.testing.assert_close(both(x, y), (vgg(x, y) + alex(x, y)) / 2)
    assert both.name == "mean of LPIPS (vgg) and LPIPS (alex)"
    assert not any(p.requires_grad for p in both.parameters())


@pytest.mark.parametrize("mode", ["vgg", "alex", "vgg+alex"])
def test_bfloat16_convolutions_have_nearly_the_same_distance_and_gradient(trained_weights, pair, mode):
    x, y = pair
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        estimate = y.clone().requires_grad_()
        distance = build_distance(mode, trained_weights, dtype=dtype)(x, estimate)
        distance.sum().backward()
        assert distance.dtype == torch.float32
        found.append((distance.detach(), estimate.grad.flatten()))
    (exact, gradient), (close, close_gradient) = found
    torch.testing.assert_close(close, exact, rtol=0.02, atol=0)
    assert not torch.equal(close, exact)
    assert torch.cosine_similarity(gradient, close_gradient, dim=0) > 0.98


def test_unknown_network():
    with pytest.raises(ValueError, match="vgg or alex"):
        LPIPS("resnet")


def test_missing_weights_say_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(tmp_path / "named"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(WeightsNotFoundError, match=r"no alexnet.*named.*FLOWMO_WEIGHTS"):
        LPIPS("alex", tmp_path / "given", download=False)


def test_order_of_the_places(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMO_WEIGHTS", str(tmp_path / "named"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    places = [tmp_path / "hub" / "hub" / "checkpoints", tmp_path / "named", tmp_path / "given"]
    for place in places:  # each beats those before it
        place.mkdir(parents=True)
        (place / "w.pth").write_text("")
        assert find_weights(("w.pth",), "http://localhost:1/w.pth", tmp_path / "given") == place / "w.pth"


def test_a_download_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWMO_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsNotFoundError, match="the download failed"):
        find_weights(("w.pth",), "http://127.0.0.1:1/w.pth")
    assert not list((tmp_path / "hub" / "checkpoints").glob("*.pth"))


# Precision


def near_pair(pair):
    """Two images that differ by noise of one grey level, where features rounded to 8 bits say nothing."""
    x, y = pair
    return x, x + (y - x) / 50


def test_lpips_is_in_float32_under_autocast(distance, pair):
    """Against a sum in NumPy over the features, in double precision, of the network outside autocast."""
    x, y = near_pair(pair)
    with torch.no_grad():
        maps = [[m.numpy().astype("float64") for m in distance.features(z)] for z in (x, y)]
    weights = [head.weight.numpy().astype("float64").reshape(1, -1, 1, 1) for head in distance.heads]
    rows = ((weight * (a - b) ** 2).sum(1).mean((1, 2)) for a, b, weight in zip(*maps, weights, strict=True))
    expected = torch.from_numpy(sum(rows)).float()
    for images in ((x, y), (x.bfloat16(), y.float())):
        with torch.autocast("cpu", torch.bfloat16):
            found = distance(*images)
        assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resnet_distances_are_in_float32_under_autocast(dtype, resnet, pair, trained_weights):
    x, y = near_pair(pair)
    stand_in = ResNetFeatures(trained_weights, download=False)
    with torch.no_grad():
        logits = [resnet.logits(z).numpy().astype("float64") for z in (x, y)]
        expected = torch.from_numpy(((logits[0] - logits[1]) ** 2).mean(1)).float()
        features = stand_in(x)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(resnet(x, y), expected, rtol=1e-4, atol=1e-9)
            assert all(torch.equal(a, b) for a, b in zip(stand_in(x)[:2], features[:2], strict=True))


def test_the_gradient_of_a_distance_is_in_float32_under_autocast(distance, pair):
    x, y = near_pair(pair)
    gradients = []
    for enabled in (False, True):
        z = y.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = distance(x, z).sum()
        loss.backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)
