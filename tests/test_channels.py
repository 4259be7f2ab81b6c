"""Images of 1, 4 and more channels: networks, files, sources, training and evaluation."""

import pytest
import torch
from conftest import TINY, TINY_NATIVE, open_gates

from flowmo import Config, ConfigError, FlowMo
from flowmo.losses.perceptual import LPIPS, build_distance


def tokenizer(channels, native=False, **settings):
    torch.manual_seed(0)
    config = Config.from_dict(TINY_NATIVE if native else TINY).updated({"model.channels": channels, **settings})
    return open_gates(FlowMo(config)).eval().requires_grad_(False)


def noise_images(channels, size=32, count=2):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


# Networks


@pytest.mark.parametrize("native", [False, True], ids=["double_stream", "windowed"])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_images_of_any_channels_go_through_both_networks(channels, native):
    tok = tokenizer(channels, native)
    images = noise_images(channels, 64 if native else 32)
    codes = tok.encode(images)
    assert codes.ids.shape[1] == tok.code_length, "the number of tokens does not depend on the channels"
    decoded = tok.decode(codes, steps=2)
    assert decoded.shape == images.shape
    changed = images.clone()
    changed[:, -1] = -changed[:, -1]
    code, other = (tok.encoder(x) for x in (images, changed))
    assert (code - other).abs().max() > 1e-4, "the last channel is read"
    assert (decoded[:, -1] - decoded[:, 0]).abs().max() > 1e-4 or channels == 1, "and written"


def test_the_identity_of_colour_models_is_what_it_was():
    assert Config.from_dict(TINY).updated({"model.channels": 3}) == Config.from_dict(TINY)
    assert tokenizer(3).identity() == tokenizer(3).identity() != tokenizer(4).identity()
    assert Config().override("data.channels=4").model.channels == 4


def test_images_of_other_channels_are_refused(tiny):
    with pytest.raises(ValueError, match=r"\(2, 4, 32, 32\); give at least one as \(batch, 3, height, width\)"):
        tiny.encode(noise_images(4))
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\); give at least one as \(batch, 4, height, width\)"):
        tokenizer(4).encode(noise_images(3))


# Perceptual channels


def test_perceptual_channels():
    named = {(1, ""): [0, 0, 0], (2, "1"): [1, 1, 1], (3, ""): [0, 1, 2], (5, ""): [0, 1, 2], (5, "4,2,1"): [4, 2, 1]}
    for (channels, text), expected in named.items():
        config = Config().updated({"model.channels": channels, "opt.perceptual_channels": text})
        assert config.perceptual_channels == expected
    with pytest.raises(ConfigError, match=r"0,1,4 must be from 0 to 3, since model\.channels=4"):
        Config().override("model.channels=4", "opt.perceptual_channels=0,1,4")
    for text in ("0,1", "red", "0,1,2,3", "-1"):
        with pytest.raises(ConfigError, match="three channels such as"):
            Config().override("model.channels=4", f"opt.perceptual_channels={text}")


@pytest.mark.parametrize("mode", ["alex", "resnet"])
def test_a_perceptual_network_sees_the_named_channels(mode):
    torch.manual_seed(0)
    plain = build_distance(mode, pretrained=False)
    state = plain.state_dict()
    x, y = noise_images(5, 64), noise_images(5, 64).flip(0)
    for channels in ([4, 2, 1], [3, 3, 3]):
        distance = build_distance(mode, None, False, channels)
        distance.load_state_dict(state)
        assert torch.equal(distance(x, y), plain(x[:, channels], y[:, channels]))
    assert isinstance(build_distance("vgg", None, False), LPIPS)
