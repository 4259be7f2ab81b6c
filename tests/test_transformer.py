import json

import pytest
import torch
from conftest import ROOT, open_gates, release_shapes
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flowmo import CheckpointError, FlowMo, preset
from flowmo.checkpoint.authors import convert_release, release_config
from flowmo.config import PRESETS, ModelConfig
from flowmo.evaluate.speed import UNCOUNTED
from flowmo.model.transformer import (
    DoubleStreamBlock,
    code_lattice,
    code_positions,
    patchify,
    rotary_angles,
    rotary_table,
    rotate,
    unpatchify,
)

CPU = torch.device("cpu")


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def release_keys(name):
    shapes = json.loads((ROOT / "tests" / "golden" / f"state_dict_{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def dead_parameters(state) -> int:
    """Parameters of the authors' model that cannot act on any output, counted from its key list alone."""
    total = 0
    for net in ("encoder", "decoder"):
        last = max(int(key.split(".")[2]) for key in state if key.startswith(f"{net}.double_blocks"))
        width = state[f"{net}.img_in.weight"].shape[0]
        unread = "img" if net == "encoder" else "txt"
        for key, value in state.items():
            if not key.startswith(f"{net}."):
                continue
            rows = value.shape[0]
            share = 0.0
            if net == "encoder" and any(part in key for part in ("time_in", "_mod.", "adaLN")):
                share = 1.0  # no timestep
            elif f"final_layer_{unread}." in key:
                share = 1.0  # the head of a stream that nobody reads
            elif key == "encoder.txt_in.weight":
                share = 1.0  # multiplies a code of zeros
            elif f"{net}.double_blocks.{last}.{unread}_" in key:
                if "qkv" in key:
                    share = width / rows  # its queries
                elif "_mod." in key:
                    share = 1 - 2 * width / rows  # all but shift and scale before attention
                elif "key_norm" not in key:
                    share = 1.0
            total += round(value.numel() * share)
    return total


@pytest.mark.parametrize(("name", "authors_count"), [("lo", 945_374e3), ("hi", 945_520e3)])
def test_parameters_are_the_authors_minus_the_dead(name, authors_count):
    state = release_keys(name)
    total = sum(value.numel() for value in state.values())
    assert total == pytest.approx(authors_count, abs=500)
    with torch.device("meta"):
        tokenizer = FlowMo(preset(name))
    assert count(tokenizer) == total - dead_parameters(state)


def test_small_is_the_authors_minus_the_dead():
    config = preset("small")
    state = {key: torch.empty(shape, device="meta") for key, shape in release_shapes(config).items()}
    assert sum(value.numel() for value in state.values()) == pytest.approx(517e6, abs=0.5e6)
    with torch.device("meta"):
        assert count(FlowMo(config)) == sum(value.numel() for value in state.values()) - dead_parameters(state)


def test_nano_fits_its_budget():
    with torch.device("meta"):
        assert count(FlowMo(preset("nano"))) * 2 < 48 * 2**20, "in float16, as it is bundled"


@pytest.mark.parametrize("name", ["lo", "hi"])
def test_all_608_keys_of_the_release_map(name):
    state = release_keys(name)
    assert len(state) == 608
    config = release_config(state)
    assert config.model == preset(name).model
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in FlowMo(config).state_dict().items()}
    assert {key: value.shape for key, value in convert_release(state, config).items()} == wanted


def test_every_row_of_the_release_is_used_or_dead():
    """Mark every number of a small authors' state dict; what arrives is exactly what is not dead, once each."""
    config = preset("lo").override(
        "model.mup_width=2", "model.enc_mup_width=2", "model.enc_depth=2", "model.dec_depth=2"
    )
    state, start = {}, 0
    for key, shape in release_shapes(config).items():
        size = torch.Size(shape).numel()
        state[key] = torch.arange(start, start + size).reshape(shape)
        start += size
    arrived = torch.cat([value.flatten() for value in convert_release(state, config).values()])
    assert len(arrived.unique()) == len(arrived) == start - dead_parameters(state)


def test_release_refuses_what_does_not_fit():
    state = release_keys("lo")
    config = release_config(state)
    key = "encoder.double_blocks.3.img_attn.qkv.weight"

    def load(state):
        with torch.device("meta"):
            FlowMo(config).load_state_dict(convert_release(state, config))

    load(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.blocks\.3\.picture\.qkv"):
        load({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surprise"):
        load({**state, "surprise": state[key]})
    with pytest.raises(RuntimeError, match=r"size mismatch for encoder\.blocks\.3\.picture\.qkv"):
        load({**state, key: torch.empty(2304, 767, device="meta")})
    with pytest.raises(CheckpointError, match="is missing"):
        release_config({"decoder.double_blocks.0.img_attn.qkv.weight": state[key]})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_the_meta_device_and_run(name):
    config = preset(name)
    with torch.device("meta"):
        tokenizer = FlowMo(config)
        side = config.data.image_size
        code = tokenizer.encoder(torch.empty(2, config.model.channels, side, side))
        assert code.shape == (2, config.model.code_length, config.model.context_dim)


def test_patches_are_rows_first_and_channels_innermost():
    images = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[0, 1, :3], images[0, :, 0, 4])
    assert torch.equal(unpatchify(patches, 4, 8), images)


def test_rotation_is_a_product_of_complex_numbers():
    x, table = torch.randn(2, 20, 3, 32), rotary_angles(0, 4, 5, 32, "diagonal", CPU)
    turns = torch.complex(*table[..., ::2])[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)
    torch.testing.assert_close(rotate(x, table), expected)


def test_rotation_keeps_lengths_and_depends_on_differences_only():
    table = rotary_angles(0, 4, 5, 32, "diagonal", CPU)
    x = torch.randn(1, 20, 2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    turned_q, turned_k = (rotate(v.expand(1, 20, 1, 32), table)[0, :, 0] for v in (q, k))
    logits = turned_q @ turned_k.T  # between places 5·row + column
    torch.testing.assert_close(logits[0, 6], logits[7, 13])
    assert (logits[0, 6] - logits[0, 1]).abs() > 1e-3


def test_positions():
    assert code_positions(5, 4, 4, "diagonal")[3].tolist() == [3, 3, 3]
    assert code_lattice(128) == (8, 16)
    lattice = code_positions(16, 4, 4, "lattice")
    assert lattice[5].tolist() == [5, 1, 1], "as many codes as patches: one on each"
    assert code_positions(4, 4, 8, "lattice")[3].tolist() == [3, 2.5, 5.5]


def test_a_batch_of_timesteps_equals_one_by_one(tiny, images):
    decoder = tiny.decoder
    t = torch.tensor([0.1, 0.5, 0.9, 0.3, 1.0])
    code = decoder.embed_code(tiny.quantizer.quantize(tiny.encoder(images))[0])
    together = decoder(images, code, t)
    for i in range(5):
        alone = decoder(images[i : i + 1], code[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-5, rtol=0)


def test_null_code_is_all_zeros_and_kept_codes_stay(tiny, images):
    decoder = tiny.decoder
    code = tiny.quantizer.quantize(tiny.encoder(images))[0]
    embedded = decoder.embed_code(code, torch.tensor([True, False, True, True, False]))
    torch.testing.assert_close(embedded[1], decoder.code_in.bias.expand(6, -1))
    torch.testing.assert_close(embedded[[0, 2, 3]], decoder.embed_code(code)[[0, 2, 3]])


def test_fresh_decoder_blocks_are_the_identity(tiny_config, images):
    tokenizer = FlowMo(tiny_config)
    decoder = tokenizer.decoder
    code = decoder.embed_code(torch.ones(5, 6, 8))
    picture = decoder.picture_in(patchify(images, 8))
    time = torch.randn(5, decoder.width)
    table = rotary_table(decoder.config, decoder.width // decoder.heads, 32, 32, CPU)
    for block in decoder.blocks:
        _, after = block(code, picture, table, time)
        assert torch.equal(after, picture)


@pytest.mark.parametrize("prediction", ["velocity", "image"])
def test_picture_prediction_is_a_velocity(tiny_config, images, prediction):
    """At t the picture predictor's one-step estimate x_t − t·v is the network's output itself."""
    torch.manual_seed(0)
    decoder = open_gates(FlowMo(tiny_config.override(f"model.prediction={prediction}"))).decoder
    t = torch.full((5,), 0.4)
    velocity = decoder(images, decoder.embed_code(torch.ones(5, 6, 8)), t)
    torch.manual_seed(0)
    raw_decoder = open_gates(FlowMo(tiny_config)).decoder
    raw = raw_decoder(images, raw_decoder.embed_code(torch.ones(5, 6, 8)), t)
    expected = raw if prediction == "velocity" else (images - raw) / 0.4
    torch.testing.assert_close(velocity, expected)


def test_attention_scale():
    def scale(width, heads, mup=True):
        return DoubleStreamBlock(ModelConfig(enable_mup=mup), width, heads, modulated=False).attention_scale

    with torch.device("meta"):
        assert scale(128, 2) == 64**-0.5
        assert scale(1152, 12) == 8 / 96
        assert scale(1152, 12, mup=False) == 96**-0.5


def test_attention_is_counted_on_cpus():
    """Two products of every pair of places; PyTorch's own counter finds none in the CPU's kernel."""
    q = torch.randn(2, 3, 40, 16)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 40 * 40 * 16


def test_training_after_inference_mode(tiny_config, images):
    """The cached rotary table is no inference tensor, which cannot be saved for a backward pass."""
    rotary_angles.cache_clear()
    tokenizer = FlowMo(tiny_config.override("opt.lpips_weight=0"))
    with torch.inference_mode():
        tokenizer.encode(images)
    tokenizer(images, seed=0).loss.backward()
    assert all(p.grad is not None for p in tokenizer.encoder.parameters())
